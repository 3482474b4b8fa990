//! Finding what the tables say.
//!
//! Nothing is changed here. A chunk of pages lies in one region of the last level, so that it is one leaf's, or it is
//! consecutive words of one table; and where these continue each other they are one [`Run`], whatever their number.

use super::{Level, Regime, Run, Table, ZERO_PFN, output, rest_of_region};
use crate::addr::{Frame, Pages, Pfn, PhysAddr};
use crate::machine::Machine;

/// The table that a walk ended in, the level of its entries, and the number of the span of pages that it speaks for.
#[derive(Clone, Copy, Debug)]
pub(super) struct LastTable {
    span: u64,
    level: Level,
    table: Pfn,
}

impl LastTable {
    /// No span has this number.
    pub(super) const NONE: Self = Self { span: u64::MAX, level: Level::THREE, table: ZERO_PFN };
}

/// Where the leaf stands that speaks for a page.
#[derive(Clone, Copy, Debug)]
struct Place {
    at: PhysAddr,
    leaf: u64,
    level: Level,
}

impl<R: Regime> Table<R> {
    /// What is said of a page; `None` beyond the input space.
    pub fn entry<M: Machine>(&self, machine: &M, frame: R::Input) -> Option<R::Entry> {
        self.run(machine, Pages::one(frame)).map(|run| run.entry())
    }

    /// The longest run that these pages begin with; `None` beyond the input space.
    #[inline(always)]
    pub fn run<M: Machine>(&self, machine: &M, pages: Pages<R::Input>) -> Option<Run<R>> {
        let start = pages.start().as_u64();
        let Place { at, leaf, level } = self.place(machine, start)?;
        let word = if level == Level::THREE { leaf } else { word_in_block::<R>(leaf, level, start) };
        let pages = if pages.count() == 1 { pages } else { alike::<M, R>(machine, at, word, level, pages) };
        Some(Run { pages, word, at, leaf, level })
    }

    /// All runs of these pages, in order, up to the end of the input space.
    pub fn runs<M: Machine>(&self, machine: &M, pages: Pages<R::Input>) -> impl Iterator<Item = Run<R>> {
        let mut rest = Some(pages);
        core::iter::from_fn(move || {
            let pages = rest?;
            let run = self.run(machine, pages)?;
            rest = pages.advanced(run.pages.count());
            Some(run)
        })
    }

    /// The run of all these pages, which lie in one region, if the table says `first` of the first and what follows
    /// from it of the others.
    ///
    /// # Errors
    /// The first page of which it says something else, or nothing because it is beyond the input space.
    #[inline(always)]
    pub fn expect<M: Machine>(
        &self,
        machine: &M,
        pages: Pages<R::Input>,
        first: R::Entry,
    ) -> Result<Run<R>, R::Input> {
        let start = pages.start();
        debug_assert!(pages.count() <= rest_of_region(start.as_u64()), "{pages:?} is no chunk");
        match self.run(machine, pages) {
            Some(run) if run.word == self.regime.encode(first) => match pages.get(run.pages.count()) {
                None => Ok(run),
                Some(other) => Err(other),
            },
            _ => Err(start),
        }
    }

    /// Number of tables that [`set`](Self::set) takes from the pool for a region.
    pub fn tables_needed<M: Machine>(&self, machine: &M, region: Pages<R::Input>) -> u64 {
        self.run(machine, region).map_or(0, |run| run.tables_needed())
    }

    /// The leaf that speaks for a page; `None` beyond the input space.
    #[inline(always)]
    fn place<M: Machine>(&self, machine: &M, frame: u64) -> Option<Place> {
        let LastTable { span, level, table } = self.last.get();
        if level.table_of(frame) == span {
            let at = table.word(level.entry_of(frame));
            let leaf = machine.read_descriptor(at);
            if !level.is_table(leaf) {
                return Some(Place { at, leaf, level });
            }
        }
        self.walk(machine, frame)
    }

    /// Finds it from the root on.
    #[inline(never)]
    fn walk<M: Machine>(&self, machine: &M, frame: u64) -> Option<Place> {
        if frame >= self.input_end() {
            return None;
        }
        let mut level = self.start;
        // Which table of the root, where it is a concatenation of several.
        let mut table = self.root.checked_add(level.table_of(frame))?;
        loop {
            let at = table.word(level.entry_of(frame));
            let word = machine.read_descriptor(at);
            if !level.is_table(word) {
                self.last.set(LastTable { span: level.table_of(frame), level, table });
                return Some(Place { at, leaf: word, level });
            }
            table = output(word);
            level = level.next();
        }
    }
}

/// The page word of a page that a block speaks for.
fn word_in_block<R: Regime>(leaf: u64, level: Level, frame: u64) -> u64 {
    let first = level.page_word(leaf);
    let offset = frame.wrapping_sub(level.first_of(frame));
    first.wrapping_add(R::step(first).wrapping_mul(offset))
}

/// The longest run of pages that these begin with, if what is said of the first stands here.
#[inline(never)]
fn alike<M: Machine, R: Regime>(
    machine: &M,
    first: PhysAddr,
    word: u64,
    level: Level,
    pages: Pages<R::Input>,
) -> Pages<R::Input> {
    if level != Level::THREE {
        return pages.truncated(level.rest(pages.start().as_u64()));
    }
    let most = pages.count().min(rest_of_region(pages.start().as_u64()));
    let step = R::step(word);
    let (mut count, mut word) = (1u64, word);
    for at in first.words(most).skip(1) {
        // A word that overflows would say something of no page.
        match word.checked_add(step) {
            Some(next) if machine.read_descriptor(at) == next => word = next,
            _ => break,
        }
        count = count.wrapping_add(1);
    }
    pages.truncated(count)
}
