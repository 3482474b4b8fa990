//! Page tables: one walker for the host's stage-2, the guests' stage-2 and EL2's own stage-1.
//!
//! A [`Table`] reads and writes 4 KiB-granule VMSAv8-64 tables through [`Machine`]; a [`Regime`] says what a
//! leaf means ([`stage2`], [`hyp_stage1`]). A leaf, valid or invalid, speaks for all pages of its block, so
//! the owner of 1 GiB of untouched RAM costs one word.
//!
//! Invariants kept here: a live descriptor changes its output address or attributes only through
//! break-before-make, in [`Table::set`] and nowhere else; when `set` returns, no TLB grants more than the
//! table does (I6). A table belongs to whoever holds its lock, whose guard gives `&mut`.

#![forbid(unsafe_code)]

pub mod hyp_stage1;
pub mod stage2;

use crate::addr::{Frame, Pages, Pfn, PhysAddr};
use crate::machine::Machine;
use crate::pool::PagePool;
use core::cell::Cell;

/// Entries of a table.
pub const ENTRIES: u64 = 512;
/// log2 of that.
const INDEX_BITS: u32 = 9;
/// Pages that one last-level table speaks for: 2 MiB. No chunk of a transition crosses such a boundary.
pub const REGION_PAGES: u64 = ENTRIES;

const VALID: u64 = 1 << 0;
const TABLE_OR_PAGE: u64 = 1 << 1;
/// Output address of a table or leaf descriptor, bits 47 to 12.
const OUTPUT_ADDRESS: u64 = 0x0000_ffff_ffff_f000;

/// Number of pages from this one to the end of what its last-level table speaks for.
pub const fn rest_of_region(frame: u64) -> u64 {
    REGION_PAGES.saturating_sub(frame & (REGION_PAGES.saturating_sub(1)))
}

/// A translation level; 3 is the last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Level(u32);

impl Level {
    /// First level of a 48-bit regime.
    pub const ZERO: Self = Self(0);
    /// 1 GiB entries.
    pub const ONE: Self = Self(1);
    /// 2 MiB entries.
    pub const TWO: Self = Self(2);
    /// Pages.
    pub const THREE: Self = Self(3);

    /// Pages that an entry of this level speaks for.
    pub const fn pages(self) -> u64 {
        1 << self.frame_shift()
    }

    const fn frame_shift(self) -> u32 {
        INDEX_BITS.saturating_mul(3u32.saturating_sub(self.0))
    }

    /// Number of the first page that an entry of this level speaks for, if it speaks for this one.
    const fn first_of(self, frame: u64) -> u64 {
        frame & !(self.pages().saturating_sub(1))
    }

    const fn next(self) -> Self {
        if self.0 < 3 { Self(self.0.saturating_add(1)) } else { Self::THREE }
    }
}

/// What the entries of a table mean, and how its translations are dropped.
pub trait Regime {
    /// Page numbers of the input space.
    type Input: Frame;
    /// What an entry says of a page.
    type Entry: Copy + PartialEq;

    /// The entry of pages that nothing was ever said of.
    const EMPTY: Self::Entry;

    /// The descriptor of a leaf at this level, valid or not, that says `entry` of its first page.
    fn encode(&self, entry: Self::Entry, level: Level) -> u64;

    /// The meaning of a descriptor that is no table.
    fn decode(&self, word: u64, level: Level) -> Self::Entry;

    /// What a leaf that says `entry` of its first page says of the page `offset` pages on.
    fn advance(&self, entry: Self::Entry, offset: u64) -> Self::Entry;

    /// The invalid descriptor that stands while a break-before-make is under way.
    fn locked(&self) -> u64;

    /// Whether a leaf may speak for a whole block. Not where a split would break a translation that another
    /// CPU cannot do without.
    const BLOCKS: bool;

    /// Bits of a valid descriptor that hardware ignores and that may change in place.
    const SOFTWARE: u64;

    /// Drops the translations of these pages on all CPUs.
    fn invalidate<M: Machine>(&self, machine: &M, root: Pfn, pages: Pages<Self::Input>);
}

/// Consecutive pages of which one entry speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run<R: Regime> {
    /// The pages.
    pub pages: Pages<R::Input>,
    /// What is said of the first; of the others see [`Regime::advance`].
    pub entry: R::Entry,
}

/// Where the entry stands that speaks for a page.
#[derive(Clone, Copy, Debug)]
struct Place {
    at: PhysAddr,
    level: Level,
    /// Number of the first page that the entry speaks for.
    first: u64,
    word: u64,
}

/// A table that a walk ended in.
#[derive(Clone, Copy, Debug)]
struct LastTable {
    level: Level,
    /// log2 of the pages that the table speaks for, and which run of so many that is.
    span: u32,
    run: u64,
    table: Pfn,
}

impl LastTable {
    /// No run has this number.
    const NONE: Self = Self { level: Level::THREE, span: INDEX_BITS, run: u64::MAX, table: ZERO_PFN };
}

/// A tree of translation tables.
#[derive(Debug)]
pub struct Table<R> {
    root: Pfn,
    start: Level,
    frame_bits: u32,
    regime: R,
    /// Where the last walk ended: check, reserve and commit of one transition look at the same entries. It holds
    /// as long as the table stays linked, so whoever unlinks one forgets it.
    last: Cell<LastTable>,
}

impl<R: Regime> Table<R> {
    /// Takes over a tree whose root starts at `root`. `input_bits` is the width of an input address; what it
    /// has beyond the start level's own 9 bits makes the root a concatenation of tables.
    pub fn new(root: Pfn, start: Level, input_bits: u32, regime: R) -> Self {
        let frame_bits = input_bits.saturating_sub(crate::addr::PAGE_SHIFT);
        Self { root, start, frame_bits, regime, last: Cell::new(LastTable::NONE) }
    }

    /// First page of the root.
    pub fn root(&self) -> Pfn {
        self.root
    }

    /// What the leaves mean.
    pub fn regime(&self) -> &R {
        &self.regime
    }

    /// Pages of the root.
    pub fn root_pages(&self) -> u64 {
        1 << self.frame_bits.saturating_sub(self.start.frame_shift().saturating_add(INDEX_BITS))
    }

    /// Number of the first page beyond the input space.
    pub fn input_end(&self) -> u64 {
        1 << self.frame_bits
    }

    /// Whether these pages lie in the input space.
    pub fn spans(&self, pages: Pages<R::Input>) -> bool {
        pages.end() <= self.input_end()
    }

    /// What is said of a page; `None` beyond the input space.
    pub fn entry<M: Machine>(&self, machine: &M, frame: R::Input) -> Option<R::Entry> {
        let place = self.place(machine, frame.as_u64(), Level::THREE)?;
        Some(self.entry_at(&place, frame.as_u64()))
    }

    /// Shows every run of entries that speaks for these pages, in order, until `visit` fails. Pages beyond
    /// the input space are not shown: see [`spans`](Self::spans).
    pub fn try_for_each<M: Machine, E>(
        &self,
        machine: &M,
        pages: Pages<R::Input>,
        mut visit: impl FnMut(Run<R>) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut frame = pages.start().as_u64();
        while frame < pages.end() {
            let Some(mut place) = self.place(machine, frame, Level::THREE) else { break };
            loop {
                let end = place.first.saturating_add(place.level.pages()).min(pages.end());
                if let Some(run) = Pages::from_raw(frame, end.saturating_sub(frame)) {
                    visit(Run { pages: run, entry: self.entry_at(&place, frame) })?;
                }
                frame = end;
                // The next page stands in the next word, as long as this last-level table lasts.
                if place.level != Level::THREE
                    || frame >= pages.end()
                    || rest_of_region(frame) == REGION_PAGES
                {
                    break;
                }
                let Some(at) = place.at.checked_add(8) else { break };
                place = Place { at, first: frame, word: machine.read_descriptor(at), ..place };
            }
        }
        Ok(())
    }

    /// Number of tables that [`set`](Self::set) takes from the pool for this region: those below the entry
    /// that speaks for it now.
    pub fn tables_needed<M: Machine>(&self, machine: &M, region: Pages<R::Input>) -> u64 {
        let target = Self::target(region);
        match self.place(machine, region.start().as_u64(), target) {
            Some(place) => u64::from(target.0.saturating_sub(place.level.0)),
            None => 0,
        }
    }

    /// Says something new of every page of a region: `entry_of` of its offset in the region.
    ///
    /// The region lies within [`REGION_PAGES`] of one last-level table, or is exactly one block that no table
    /// speaks for yet. The entries of a whole block must continue the first one ([`Regime::advance`]). The pool
    /// holds at least [`tables_needed`](Self::tables_needed) pages: the caller has checked, under the lock
    /// that it still holds. Where access is taken away it is gone from every TLB when this returns.
    pub fn set<M: Machine>(
        &mut self,
        machine: &M,
        region: Pages<R::Input>,
        pool: &mut PagePool,
        entry_of: impl Fn(u64) -> R::Entry,
    ) {
        let start = region.start().as_u64();
        let target = Self::target(region);
        let Some(mut place) = self.place(machine, start, target) else {
            crate::broken("a table was set beyond its input space");
        };
        while place.level < target {
            self.split(machine, &place, pool);
            place = match self.place(machine, start, target) {
                Some(deeper) if deeper.level > place.level => deeper,
                _ => crate::broken("a split made no table"),
            };
        }
        if place.level < Level::THREE && !is_table(place.word, place.level) {
            self.replace(machine, region, place.at, 1, place.level, &entry_of);
        } else {
            let leaf = if place.level == Level::THREE {
                place
            } else {
                self.place(machine, start, Level::THREE).unwrap_or(place)
            };
            if leaf.level != Level::THREE || region.count() > rest_of_region(start) {
                crate::broken("a region is more than one last-level table");
            }
            self.replace(machine, region, leaf.at, region.count(), Level::THREE, &entry_of);
        }
    }

    /// Like [`set`](Self::set), for entries that continue each other: `first` of the first page.
    pub fn set_from<M: Machine>(
        &mut self,
        machine: &M,
        region: Pages<R::Input>,
        pool: &mut PagePool,
        first: R::Entry,
    ) where
        R: Copy,
    {
        let regime = self.regime;
        self.set(machine, region, pool, |offset| regime.advance(first, offset));
    }

    /// Splits pages into regions that [`set`](Self::set) takes whole: the largest blocks that input and output
    /// alignment allow, else what lies in one last-level table. `output` is the number of the first output
    /// page.
    pub fn regions(pages: Pages<R::Input>, output: u64) -> impl Iterator<Item = Pages<R::Input>> {
        let mut rest = Some(pages);
        let mut output = output;
        core::iter::from_fn(move || {
            let pages = rest?;
            let start = pages.start().as_u64();
            let block = [Level::ONE, Level::TWO].into_iter().find(|level| {
                let size = level.pages();
                R::BLOCKS && pages.count() >= size && (start | output) & size.saturating_sub(1) == 0
            });
            let count = match block {
                Some(level) => level.pages(),
                None => rest_of_region(start).min(pages.count()),
            };
            rest = pages.advanced(count);
            output = output.saturating_add(count);
            Some(pages.truncated(count))
        })
    }

    /// Says of the whole space that nothing is known of it: for a new root.
    pub fn clear<M: Machine>(&self, machine: &M) {
        let empty = self.regime.encode(R::EMPTY, self.start);
        for index in 0..self.root_pages().saturating_mul(ENTRIES) {
            if let Some(at) = self.root.base().checked_add(index.saturating_mul(8)) {
                machine.write_descriptor(at, empty);
            }
        }
        machine.publish();
    }

    /// Says what follows from `first` of every whole entry of the root that lies in these pages, and of nothing
    /// else: for a new root, which no walker has seen and below which there is no table yet.
    pub fn fill_root<M: Machine>(&self, machine: &M, pages: Pages<R::Input>, first: R::Entry) {
        let size = self.start.pages();
        let end = pages.end().min(self.input_end());
        let entries = pages.start().as_u64().div_ceil(size)..end >> self.start.frame_shift();
        for index in entries {
            let offset = index.saturating_mul(size).saturating_sub(pages.start().as_u64());
            let word = self.regime.encode(self.regime.advance(first, offset), self.start);
            if let Some(table) = self.root.checked_add(index >> INDEX_BITS) {
                machine.write_descriptor(table.word(index), word);
            }
        }
        machine.publish();
    }

    /// A table that has no table below it; `None` when only the root is left.
    pub fn lowest_table<M: Machine>(&self, machine: &M) -> Option<Pfn> {
        self.lowest_link(machine).map(|(_, table, _)| table)
    }

    /// Unlinks that table and returns its page, wiped by nobody. For trees whose VM is dying: no leaf of the table
    /// may be valid any more.
    pub fn unlink_table<M: Machine>(&mut self, machine: &M) -> Option<Pfn> {
        let (at, table, level) = self.lowest_link(machine)?;
        self.last.set(LastTable::NONE);
        machine.write_descriptor(at, self.regime.encode(R::EMPTY, level));
        machine.publish();
        Some(table)
    }

    /// Where the lowest table is linked, its page, and its level.
    fn lowest_link<M: Machine>(&self, machine: &M) -> Option<(PhysAddr, Pfn, Level)> {
        let mut parent: Option<PhysAddr> = None;
        let mut table = self.root;
        let mut words = self.root_pages().saturating_mul(ENTRIES);
        let mut level = self.start;
        loop {
            let child = (0..words).find_map(|index| {
                let at = table.base().checked_add(index.saturating_mul(8))?;
                let word = machine.read_descriptor(at);
                is_table(word, level).then_some((at, output(word)))
            });
            match (child, parent) {
                (Some((at, next)), _) => {
                    parent = Some(at);
                    table = next;
                    words = ENTRIES;
                    level = level.next();
                }
                (None, parent) => return parent.map(|at| (at, table, level)),
            }
        }
    }

    /// Puts 512 leaves that say the same in the place of one: the only way that a block becomes a table.
    fn split<M: Machine>(&self, machine: &M, place: &Place, pool: &mut PagePool) {
        let Some(table) = pool.pop(machine) else {
            crate::broken("a reserved table is missing");
        };
        let below = place.level.next();
        self.write_parts(machine, table, below, self.regime.decode(place.word, place.level));
        machine.publish();
        let block = Pages::from_raw(place.first, place.level.pages());
        if let Some(block) = block.filter(|_| place.word & VALID != 0) {
            self.break_entry(machine, place.at, block);
        }
        machine.write_descriptor(place.at, table.base().as_u64() | VALID | TABLE_OR_PAGE);
        machine.publish();
    }

    /// Fills a table that nothing links yet with entries that continue each other.
    ///
    /// What a word says of its page, an address or a page of the owner's, is one field of it, so that each word
    /// is the one before and a constant. Not so where the field would overflow: that is no entry that was ever
    /// written, and it is split word by word.
    fn write_parts<M: Machine>(&self, machine: &M, table: Pfn, level: Level, first: R::Entry) {
        let part = |index: u64| self.regime.advance(first, index.saturating_mul(level.pages()));
        let word = |index| self.regime.encode(part(index), level);
        let step = word(1).wrapping_sub(word(0));
        let last = ENTRIES.saturating_sub(1);
        let is_even = word(0).wrapping_add(step.wrapping_mul(last)) == word(last);
        let mut next = word(0);
        for index in 0..ENTRIES {
            machine.write_descriptor(table.word(index), if is_even { next } else { word(index) });
            next = next.wrapping_add(step);
        }
    }

    /// Break: makes a valid entry invalid and waits until no CPU uses it. The make is the caller's.
    fn break_entry<M: Machine>(&self, machine: &M, at: PhysAddr, pages: Pages<R::Input>) {
        machine.write_descriptor(at, self.regime.locked());
        machine.publish();
        self.regime.invalidate(machine, self.root, pages);
    }

    /// Writes `count` consecutive leaves of one table, with one invalidation for all that lose access.
    fn replace<M: Machine>(
        &self,
        machine: &M,
        region: Pages<R::Input>,
        at: PhysAddr,
        count: u64,
        level: Level,
        entry_of: &impl Fn(u64) -> R::Entry,
    ) {
        let mut broken = false;
        let mut locked = false;
        for index in 0..count {
            let Some(at) = at.checked_add(index.saturating_mul(8)) else { break };
            let old = machine.read_descriptor(at);
            let new = self.regime.encode(entry_of(index), level);
            if old & VALID == 0 || (old ^ new) & !R::SOFTWARE == 0 {
                machine.write_descriptor(at, new);
            } else {
                broken = true;
                let make_later = new & VALID != 0;
                locked |= make_later;
                machine.write_descriptor(at, if make_later { self.regime.locked() } else { new });
            }
        }
        machine.publish();
        if broken {
            self.regime.invalidate(machine, self.root, region);
        }
        if locked {
            for index in 0..count {
                let Some(at) = at.checked_add(index.saturating_mul(8)) else { break };
                machine.write_descriptor(at, self.regime.encode(entry_of(index), level));
            }
            machine.publish();
        }
    }

    /// Level at which a region is written: a block's where the region is just that block, else the last.
    fn target(region: Pages<R::Input>) -> Level {
        if region.count() < REGION_PAGES {
            return Level::THREE;
        }
        let start = region.start().as_u64();
        [Level::ONE, Level::TWO]
            .into_iter()
            .find(|level| {
                R::BLOCKS && region.count() == level.pages() && start & level.pages().saturating_sub(1) == 0
            })
            .unwrap_or(Level::THREE)
    }

    /// The entry that speaks for a page, at `deepest` or above; `None` beyond the input space.
    #[inline]
    fn place<M: Machine>(&self, machine: &M, frame: u64, deepest: Level) -> Option<Place> {
        let last = self.last.get();
        if frame >> last.span == last.run && last.level <= deepest {
            let at = last.table.word(frame >> last.level.frame_shift());
            let word = machine.read_descriptor(at);
            if !is_table(word, last.level) || last.level == deepest {
                return Some(Place { at, level: last.level, first: last.level.first_of(frame), word });
            }
        }
        self.walk(machine, frame, deepest)
    }

    /// Finds the place from the root on.
    #[inline(never)]
    fn walk<M: Machine>(&self, machine: &M, frame: u64, deepest: Level) -> Option<Place> {
        if frame >= self.input_end() {
            return None;
        }
        let mut level = self.start;
        let index = frame >> level.frame_shift();
        let mut table = self.root.checked_add(index >> INDEX_BITS)?;
        loop {
            let at = table.word(frame >> level.frame_shift());
            let word = machine.read_descriptor(at);
            if level >= deepest || !is_table(word, level) {
                let span = level.frame_shift().saturating_add(INDEX_BITS);
                self.last.set(LastTable { level, span, run: frame >> span, table });
                return Some(Place { at, level, first: level.first_of(frame), word });
            }
            table = output(word);
            level = level.next();
        }
    }

    #[inline]
    fn entry_at(&self, place: &Place, frame: u64) -> R::Entry {
        let entry = self.regime.decode(place.word, place.level);
        match frame.saturating_sub(place.first) {
            0 => entry,
            offset => self.regime.advance(entry, offset),
        }
    }
}

/// Whether a descriptor of this level points to a table.
fn is_table(word: u64, level: Level) -> bool {
    level < Level::THREE && word & (VALID | TABLE_OR_PAGE) == VALID | TABLE_OR_PAGE
}

/// The page that a table or leaf descriptor points to.
fn output(word: u64) -> Pfn {
    // The mask leaves 48 bits, so the number always fits.
    Pfn::new((word & OUTPUT_ADDRESS) >> crate::addr::PAGE_SHIFT).unwrap_or(ZERO_PFN)
}

const ZERO_PFN: Pfn = match Pfn::new(0) {
    Some(pfn) => pfn,
    None => unreachable!(),
};

/// The type bits of a valid leaf at this level.
fn leaf_type(level: Level) -> u64 {
    if level == Level::THREE { VALID | TABLE_OR_PAGE } else { VALID }
}

#[cfg(test)]
mod tests {
    use super::stage2::{Entry, GUEST_IPA_BITS, Page, Sharing, Side, Stage2};
    use super::*;
    use crate::addr::Gfn;
    use crate::testing::TestMachine;
    use abi::page::Permissions;

    /// A guest's table, its pool, and the pages of RAM that are left.
    fn table(machine: &TestMachine) -> (Table<Stage2>, PagePool, Pages<Pfn>) {
        let regime = Stage2 { vmid: 1, force_write_back: false, side: Side::Guest };
        let table = Table::new(machine.ram(0, 2).start(), Level::ONE, GUEST_IPA_BITS, regime);
        table.clear(machine);
        let mut pool = PagePool::new();
        pool.extend(machine, machine.ram(2, 4));
        (table, pool, machine.ram(6, 8))
    }

    fn page(pfn: Pfn) -> Entry {
        Entry::Page(Page { pfn, sharing: Sharing::Owned, permissions: Permissions::ALL })
    }

    #[test]
    fn a_table_that_was_unlinked_is_looked_at_no_more() {
        let machine = TestMachine::new();
        let (mut table, mut pool, ram) = table(&machine);
        let gfns = Pages::<Gfn>::from_raw(0x600, 2).unwrap();
        table.set_from(&machine, gfns, &mut pool, page(ram.start()));
        assert_eq!(table.entry(&machine, gfns.start()), Some(page(ram.start())));
        table.set(&machine, gfns, &mut pool, |_| Entry::Empty);
        let unlinked = table.unlink_table(&machine).unwrap();
        // Whoever has the page now may write what looks like an entry.
        let word = table.regime().encode(page(ram.start()), Level::THREE);
        machine.write_descriptor(unlinked.word(gfns.start().as_u64()), word);
        assert_eq!(table.entry(&machine, gfns.start()), Some(Entry::Empty));
    }

    #[test]
    fn what_a_walk_remembers_serves_no_other_region_and_no_deeper_level() {
        let machine = TestMachine::new();
        let (mut table, mut pool, ram) = table(&machine);
        let (near, far) =
            (Pages::<Gfn>::from_raw(0x600, 1).unwrap(), Gfn::new(0x600 + REGION_PAGES).unwrap());
        // Remembers the root, then a table of level 2, then one of level 3.
        assert_eq!(table.entry(&machine, near.start()), Some(Entry::Empty));
        table.set_from(&machine, near, &mut pool, page(ram.start()));
        assert_eq!(table.entry(&machine, far), Some(Entry::Empty));
        assert_eq!(table.entry(&machine, near.start()), Some(page(ram.start())));
        assert_eq!(table.entry(&machine, far), Some(Entry::Empty));
        assert_eq!(table.tables_needed(&machine, Pages::one(far)), 1);
        assert_eq!(table.tables_needed(&machine, near), 0);
    }
}
