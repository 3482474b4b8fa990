//! Page tables: one walker for the host's stage-2, the guests' stage-2 and EL2's own stage-1.
//!
//! A [`Table`] reads and writes 4 KiB-granule VMSAv8-64 tables through [`Machine`]; a [`Regime`] says what a
//! leaf means ([`stage2`], [`hyp_stage1`]). A leaf, valid or invalid, speaks for all pages of its block, so
//! the owner of 1 GiB of untouched RAM costs one word.
//!
//! | file | what it does |
//! |---|---|
//! | [`walk`] | finds what the tables say: a [`Run`] of pages at a time |
//! | [`change`] | makes them say something else: the one place with break-before-make and splits |
//!
//! What is said of a page is one word, its *page word*: the descriptor that a last-level table has for the page, or
//! would have if a block did not speak for it. All comparing and counting on is done with page words, by
//! [`Regime::step`]; entries with a meaning are made of them only for whoever asks.
//!
//! Invariants kept here: a live descriptor changes its output address or attributes only through
//! break-before-make, in [`Table::change`] and nowhere else; when it returns, no TLB grants more than the
//! table does (I6). A table belongs to whoever holds its lock, whose guard gives `&mut`.

#![forbid(unsafe_code)]

pub mod change;
pub mod hyp_stage1;
pub mod stage2;
pub mod walk;

use crate::addr::{Frame, Pages, Pfn, PhysAddr};
use crate::machine::Machine;
use core::cell::Cell;
use walk::LastTable;

/// Entries of a table.
pub const ENTRIES: u64 = 512;
/// log2 of that.
const INDEX_BITS: u32 = 9;
/// Pages that one last-level table speaks for: 2 MiB. No chunk of a transition crosses such a boundary.
pub const REGION_PAGES: u64 = ENTRIES;

const VALID: u64 = 1 << 0;
/// In a valid descriptor: a table above the last level, a page at the last level. Clear in a block.
const TABLE_OR_PAGE: u64 = 1 << 1;
/// Output address of a table or leaf descriptor, bits 47 to 12.
const OUTPUT_ADDRESS: u64 = 0x0000_ffff_ffff_f000;

/// Number of pages from this one to the end of what its last-level table speaks for.
pub const fn rest_of_region(frame: u64) -> u64 {
    Level::TWO.rest(frame)
}

/// A translation level, as log2 of the pages that an entry of it speaks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Level(u32);

impl Level {
    /// First level of a 48-bit regime.
    pub const ZERO: Self = Self(3 * INDEX_BITS);
    /// 1 GiB entries.
    pub const ONE: Self = Self(2 * INDEX_BITS);
    /// 2 MiB entries.
    pub const TWO: Self = Self(INDEX_BITS);
    /// Pages.
    pub const THREE: Self = Self(0);

    /// Pages that an entry of this level speaks for.
    pub const fn pages(self) -> u64 {
        1u64.wrapping_shl(self.0)
    }

    /// Number of the entry of this level that speaks for a page, counted from the start of the input space.
    const fn entry_of(self, frame: u64) -> u64 {
        frame.wrapping_shr(self.0)
    }

    /// Number of the table of such entries, likewise.
    const fn table_of(self, frame: u64) -> u64 {
        self.entry_of(frame) / ENTRIES
    }

    /// Number of the first page that an entry of this level speaks for, if it speaks for this one.
    const fn first_of(self, frame: u64) -> u64 {
        frame & !(self.pages().wrapping_sub(1))
    }

    /// Number of pages from this one to the last that the same entry speaks for.
    const fn rest(self, frame: u64) -> u64 {
        self.pages().wrapping_sub(frame & self.pages().wrapping_sub(1))
    }

    const fn next(self) -> Self {
        Self(self.0.saturating_sub(INDEX_BITS))
    }

    /// Number of tables between an entry of this level and one of a deeper level.
    const fn tables_down_to(self, deeper: Self) -> u64 {
        (self.0.saturating_sub(deeper.0) / INDEX_BITS) as u64
    }

    /// The descriptor with which an entry of this level says of its first page what a page word says.
    const fn leaf(self, page_word: u64) -> u64 {
        if self.0 > 0 && page_word & VALID != 0 { page_word & !TABLE_OR_PAGE } else { page_word }
    }

    /// The inverse: the page word of the first page that a leaf of this level speaks for.
    const fn page_word(self, leaf: u64) -> u64 {
        if self.0 > 0 && leaf & VALID != 0 { leaf | TABLE_OR_PAGE } else { leaf }
    }

    /// Whether a descriptor of this level points to a table.
    const fn is_table(self, word: u64) -> bool {
        self.0 > 0 && word & (VALID | TABLE_OR_PAGE) == VALID | TABLE_OR_PAGE
    }
}

/// What the entries of a table mean, and how its translations are dropped.
pub trait Regime {
    /// Page numbers of the input space.
    type Input: Frame;
    /// What an entry says of a page.
    type Entry: Copy + PartialEq;

    /// The entry of pages that nothing was ever said of. Its page word is 0.
    const EMPTY: Self::Entry;

    /// The page word of an entry.
    fn encode(&self, entry: Self::Entry) -> u64;

    /// The meaning of a page word.
    fn decode(page_word: u64) -> Self::Entry;

    /// How much more the page word of the next page is, where one leaf speaks for both: a page more in the field
    /// that names one, if there is such a field.
    fn step(page_word: u64) -> u64;

    /// The invalid descriptor that stands while a break-before-make is under way.
    const LOCKED: u64;

    /// Whether a valid leaf may be broken to be made anew: so that it says something else, or so that a block is split.
    /// Not where another CPU cannot do without the translation meanwhile; there no leaf speaks for a block.
    const BREAKS: bool;

    /// Bits of a valid descriptor that hardware ignores and that may change in place.
    const SOFTWARE: u64;

    /// Drops the translations of these pages on all CPUs.
    fn invalidate<M: Machine>(&self, machine: &M, root: Pfn, pages: Pages<Self::Input>);

    /// What a leaf that says `entry` of a page says of the page `offset` pages on.
    fn advance(&self, entry: Self::Entry, offset: u64) -> Self::Entry {
        let word = self.encode(entry);
        Self::decode(word.wrapping_add(Self::step(word).wrapping_mul(offset)))
    }
}

/// Consecutive pages of which one leaf speaks, or leaves of one last-level table that continue each other: as far as
/// the tables are concerned, one thing. Found by [`Table::run`], and good until the table is changed.
#[derive(Debug)]
pub struct Run<R: Regime> {
    pages: Pages<R::Input>,
    /// Page word of the first of them.
    word: u64,
    /// Where its leaf stands, that leaf, and its level.
    at: PhysAddr,
    leaf: u64,
    level: Level,
}

impl<R: Regime> Run<R> {
    /// The pages.
    pub fn pages(&self) -> Pages<R::Input> {
        self.pages
    }

    /// What is said of the first. Of the others is said what follows from it ([`Regime::advance`]).
    #[inline]
    pub fn entry(&self) -> R::Entry {
        R::decode(self.word)
    }

    /// Number of tables that a change of these pages, and of no others, takes from the pool: those below the leaf
    /// that speaks for them now.
    #[inline]
    pub fn tables_needed(&self) -> u64 {
        if self.level == Level::THREE {
            return 0;
        }
        self.level.tables_down_to(target::<R>(self.pages))
    }
}

/// Level of the leaf that is to speak for these pages: a block's where they are just that block, else the last.
#[inline(never)]
fn target<R: Regime>(pages: Pages<R::Input>) -> Level {
    if !R::BREAKS || pages.count() < REGION_PAGES {
        return Level::THREE;
    }
    let start = pages.start().as_u64();
    [Level::ONE, Level::TWO]
        .into_iter()
        .find(|level| pages.count() == level.pages() && level.first_of(start) == start)
        .unwrap_or(Level::THREE)
}

/// A tree of translation tables.
#[derive(Debug)]
pub struct Table<R> {
    root: Pfn,
    start: Level,
    frame_bits: u32,
    regime: R,
    /// The last-level table that the last walk ended in: the next look is mostly at the same one. It holds as long as
    /// the table stays linked, so whoever unlinks one forgets it.
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
        1 << self.frame_bits.saturating_sub(self.start.0.saturating_add(INDEX_BITS))
    }

    /// Number of the first page beyond the input space.
    pub fn input_end(&self) -> u64 {
        1 << self.frame_bits
    }

    /// Whether these pages lie in the input space.
    pub fn spans(&self, pages: Pages<R::Input>) -> bool {
        pages.end() <= self.input_end()
    }

    /// Splits pages into regions that [`set`](Self::set) takes whole: the largest blocks that their alignment allows,
    /// else what lies in one last-level table. For pages that stand for themselves, or that no memory stands behind.
    pub fn regions(pages: Pages<R::Input>) -> impl Iterator<Item = Pages<R::Input>> {
        let mut rest = Some(pages);
        core::iter::from_fn(move || {
            let pages = rest?;
            let start = pages.start().as_u64();
            let block = [Level::ONE, Level::TWO].into_iter().find(|level| {
                let size = level.pages();
                R::BREAKS && pages.count() >= size && level.first_of(start) == start
            });
            let count = match block {
                Some(level) => level.pages(),
                None => rest_of_region(start).min(pages.count()),
            };
            rest = pages.advanced(count);
            Some(pages.truncated(count))
        })
    }
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

#[cfg(test)]
mod tests {
    use super::stage2::{Entry, GUEST_IPA_BITS, Owner, Page, Sharing, Side, Stage2};
    use super::*;
    use crate::addr::Gfn;
    use crate::pool::PagePool;
    use crate::testing::TestMachine;
    use abi::page::Permissions;

    /// A guest's table, its pool, and the pages of RAM that are left.
    fn table(machine: &TestMachine) -> (Table<Stage2>, PagePool, Pages<Pfn>) {
        let regime = Stage2::new(1, false, Side::Guest);
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
        table.set(&machine, gfns, &mut pool, page(ram.start()));
        assert_eq!(table.entry(&machine, gfns.start()), Some(page(ram.start())));
        table.set(&machine, gfns, &mut pool, Entry::Empty);
        let unlinked = table.unlink_table(&machine).unwrap();
        // Whoever has the page now may write what looks like an entry.
        let word = table.regime().encode(page(ram.start()));
        machine.write_descriptor(unlinked.word(gfns.start().as_u64()), word);
        assert_eq!(table.entry(&machine, gfns.start()), Some(Entry::Empty));
    }

    #[test]
    fn what_no_tlb_can_hold_is_not_invalidated() {
        let machine = TestMachine::new();
        let (mut table, mut pool, ram) = table(&machine);
        let gfns = Pages::<Gfn>::from_raw(0x600, 2).unwrap();
        let mut invalidations = |entry| {
            machine.sim().clear();
            table.set(&machine, gfns, &mut pool, entry);
            let is_tlbi = |event: &&sim::Event| matches!(event, sim::Event::TlbiStage2Ipa { .. });
            machine.sim().events().iter().filter(is_tlbi).count()
        };
        assert_eq!(invalidations(page(ram.start())), 0, "there was nothing");
        assert_eq!(invalidations(Entry::Empty), 1);
        assert_eq!(invalidations(Entry::Owned(Owner::Hyp)), 0, "nor is there now");
    }

    #[test]
    fn what_a_walk_remembers_serves_no_other_region_and_no_deeper_level() {
        let machine = TestMachine::new();
        let (mut table, mut pool, ram) = table(&machine);
        let (near, far) =
            (Pages::<Gfn>::from_raw(0x600, 1).unwrap(), Gfn::new(0x600 + REGION_PAGES).unwrap());
        // Remembers the root, then a table of level 2, then one of level 3.
        assert_eq!(table.entry(&machine, near.start()), Some(Entry::Empty));
        table.set(&machine, near, &mut pool, page(ram.start()));
        assert_eq!(table.entry(&machine, far), Some(Entry::Empty));
        assert_eq!(table.entry(&machine, near.start()), Some(page(ram.start())));
        assert_eq!(table.entry(&machine, far), Some(Entry::Empty));
        assert_eq!(table.tables_needed(&machine, Pages::one(far)), 1);
        assert_eq!(table.tables_needed(&machine, near), 0);
    }

    #[test]
    fn a_block_of_blocks_loses_one_page_and_shows_the_others_where_they_were() {
        let machine = TestMachine::new();
        let (mut table, mut pool, _) = table(&machine);
        let gfns = Pages::<Gfn>::from_raw(Level::ONE.pages(), Level::ONE.pages()).unwrap();
        let shown = |offset| page(Pfn::new(2 * Level::ONE.pages() + offset).unwrap());
        table.set(&machine, gfns, &mut pool, shown(0));
        let hole = gfns.get(0x1234).unwrap();
        table.set(&machine, Pages::one(hole), &mut pool, Entry::Empty);
        assert_eq!(table.entry(&machine, hole), Some(Entry::Empty));
        for offset in [0, 0x1ff, 0x200, 0x1000, 0x1233, 0x1235, 0x1400, 0x3_ffff] {
            let gfn = gfns.get(offset).unwrap();
            assert_eq!(table.entry(&machine, gfn), Some(shown(offset)), "{offset:#x}");
        }
    }
}
