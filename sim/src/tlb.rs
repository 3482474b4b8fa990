//! The TLB of one CPU. It never evicts: every translation it ever cached stays until an invalidation of the
//! right regime and address, and old and new translations of one address live side by side. It caches the
//! table pointers on the way as well (Arm ARM D8.16), so that a table which is unlinked but not invalidated
//! can still be walked.

use std::collections::BTreeMap;

use crate::format::span;
use crate::pending::Range;
use crate::walk::{Found, Leaf, Regime, TablePointer};

/// What one entry holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cached {
    /// A block or page.
    Leaf(Leaf),
    /// A pointer to a table below.
    Table(TablePointer),
}

/// Entries that would stand in one table.
const ENTRIES: usize = 512;

/// A table's worth of entries.
#[derive(Clone, Debug)]
struct Node {
    /// What is cached of each descriptor that would stand there.
    entries: Box<[Vec<Cached>; ENTRIES]>,
    /// The table of which all is cached, and its version.
    filled: Option<(TablePointer, u64)>,
}

impl Default for Node {
    fn default() -> Self {
        Self { entries: Box::new([const { Vec::new() }; ENTRIES]), filled: None }
    }
}

/// The entries of one level, by input address.
#[derive(Clone, Debug)]
struct Level {
    /// Input addresses that one entry covers.
    span: u64,
    /// By the input addresses that a node covers, in units of as many.
    nodes: BTreeMap<u64, Node>,
}

impl Level {
    fn new(level: u8) -> Self {
        Self { span: span(level), nodes: BTreeMap::new() }
    }

    /// Returns the node that an input address belongs to, and the place there.
    fn place(&self, ia: u64) -> (u64, usize) {
        let number = ia / self.span;
        (number / ENTRIES as u64, (number % ENTRIES as u64) as usize)
    }

    fn insert(&mut self, ia: u64, cached: Cached) {
        let (node, place) = self.place(ia);
        let same_address = &mut self.nodes.entry(node).or_default().entries[place];
        if !same_address.contains(&cached) {
            same_address.push(cached);
        }
    }

    /// Notes that all of a version of a table is about to be cached. Returns whether it was not before.
    fn fill(&mut self, ia: u64, table: TablePointer, version: u64) -> bool {
        let (node, _) = self.place(ia);
        let filled = &mut self.nodes.entry(node).or_default().filled;
        filled.replace((table, version)) != Some((table, version))
    }

    /// Returns the entries that apply to an input address.
    fn at(&self, ia: u64) -> &[Cached] {
        let (node, place) = self.place(ia);
        self.nodes.get(&node).map_or(&[], |node| &node.entries[place])
    }

    /// Returns the entries that cover any address of a range, with first input address and size.
    fn overlapping(&self, range: Range) -> impl Iterator<Item = (u64, u64, Cached)> {
        let places = Places::of(self, range);
        self.nodes.range(places.nodes()).flat_map(move |(&number, node)| {
            let within = places.within(number);
            (within.start..).zip(&node.entries[within]).flat_map(move |(place, same_address)| {
                let ia = (number * ENTRIES as u64 + place as u64) * self.span;
                same_address.iter().map(move |&cached| (ia, self.span, cached))
            })
        })
    }

    /// Forgets the entries that cover any address of a range.
    fn forget(&mut self, range: Range) {
        let places = Places::of(self, range);
        for (&number, node) in self.nodes.range_mut(places.nodes()) {
            node.entries[places.within(number)].iter_mut().for_each(Vec::clear);
            node.filled = None;
        }
    }
}

/// The places of a level, as node and place there, from the first to before the last.
#[derive(Clone, Copy)]
struct Places {
    first: (u64, usize),
    last: (u64, usize),
}

impl Places {
    /// Those whose entries cover any address of a range.
    fn of(level: &Level, range: Range) -> Self {
        let first = level.place(range.start);
        let last = if range.is_empty() {
            first
        } else {
            let (node, place) = level.place(range.end - 1);
            (node, place + 1)
        };
        Self { first, last }
    }

    fn nodes(&self) -> std::ops::RangeInclusive<u64> {
        self.first.0..=self.last.0
    }

    fn within(&self, node: u64) -> std::ops::Range<usize> {
        let start = if node == self.first.0 { self.first.1 } else { 0 };
        let end = if node == self.last.0 { self.last.1 } else { ENTRIES };
        start..end
    }
}

/// The entries of one regime, by level of the descriptor they come from.
#[derive(Clone, Debug)]
struct Entries([Level; 4]);

impl Default for Entries {
    fn default() -> Self {
        Self(std::array::from_fn(|level| Level::new(level as u8)))
    }
}

/// What an invalidation applies to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scope {
    /// The addresses from `start` to before `end` of one regime.
    Range { regime: Regime, start: u64, end: u64 },
    /// All of one regime.
    Regime(Regime),
    /// Stage 2 of every VMID.
    AllStage2,
}

impl Scope {
    /// Returns the addresses of `regime` that the invalidation applies to.
    pub(crate) fn range_in(&self, regime: Regime) -> Option<Range> {
        match *self {
            Scope::Range { regime: hit, start, end } if hit == regime => Some(Range { start, end }),
            Scope::Regime(hit) if hit == regime => Some(Range::ALL),
            Scope::AllStage2 if regime != Regime::El2 => Some(Range::ALL),
            _ => None,
        }
    }
}

/// The TLB of one CPU.
#[derive(Clone, Debug, Default)]
pub(crate) struct Tlb {
    regimes: BTreeMap<Regime, Entries>,
}

impl Tlb {
    /// Caches what a walk found.
    pub(crate) fn insert(&mut self, regime: Regime, found: Found) {
        let (level, ia, cached) = match found {
            Found::Leaf(leaf) => (leaf.level(), leaf.ipa, Cached::Leaf(leaf)),
            Found::Table { level, ia, pointer } => (level, ia, Cached::Table(pointer)),
        };
        self.regimes.entry(regime).or_default().0[usize::from(level)].insert(ia, cached);
    }

    /// Notes that all of a version of a table that translates the addresses from `ia` on is about to be cached.
    /// Returns whether it was not before.
    pub(crate) fn fill(&mut self, regime: Regime, ia: u64, table: TablePointer, version: u64) -> bool {
        self.regimes.entry(regime).or_default().0[usize::from(table.level)].fill(ia, table, version)
    }

    /// Returns the levels of a regime.
    fn levels(&self, regime: Regime) -> impl Iterator<Item = &Level> {
        self.regimes.get(&regime).into_iter().flat_map(|entries| &entries.0)
    }

    /// Returns every entry that applies to an input address, larger ones first, and older before newer within a size.
    pub(crate) fn lookup(&self, regime: Regime, ia: u64) -> impl Iterator<Item = Cached> {
        self.levels(regime).flat_map(move |level| level.at(ia)).copied()
    }

    /// Returns the entries of a regime that cover any address of a range, with first input address and size.
    pub(crate) fn overlapping(
        &self,
        regime: Regime,
        range: Range,
    ) -> impl Iterator<Item = (u64, u64, Cached)> {
        self.levels(regime).flat_map(move |level| level.overlapping(range))
    }

    /// Returns every entry, with its regime, first input address and size.
    pub(crate) fn entries(&self) -> impl Iterator<Item = (Regime, u64, u64, Cached)> {
        self.regimes.keys().flat_map(|&regime| {
            self.overlapping(regime, Range::ALL).map(move |(ia, size, cached)| (regime, ia, size, cached))
        })
    }

    /// Forgets the entries that a TLBI reaches: those of which any address is in its scope.
    pub(crate) fn invalidate(&mut self, scope: &Scope) {
        self.regimes.retain(|&regime, entries| {
            let Some(range) = scope.range_in(regime) else { return true };
            if range == Range::ALL {
                return false;
            }
            entries.0.iter_mut().for_each(|level| level.forget(range));
            true
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::Limits;

    const VM: Regime = Regime::Stage2 { vmid: 3 };
    const OTHER: Regime = Regime::Stage2 { vmid: 4 };

    fn leaf(ipa: u64, size: u64, pa: u64) -> Found {
        Found::Leaf(Leaf { ipa, pa, size, read: true, write: true, execute: true, memattr: 15, sw: 0 })
    }

    fn full() -> Tlb {
        let mut tlb = Tlb::default();
        for regime in [VM, OTHER, Regime::El2] {
            tlb.insert(regime, leaf(0x20_0000, 0x1000, 0x1000));
            tlb.insert(regime, leaf(0x20_1000, 0x1000, 0x2000));
            tlb.insert(regime, leaf(0x20_0000, 0x20_0000, 0x40_0000));
            tlb.insert(regime, leaf(0, 1 << 30, 0));
            let pointer = TablePointer { level: 3, table: 0x9000, limits: Limits::default() };
            tlb.insert(regime, Found::Table { level: 2, ia: 0x20_0000, pointer });
        }
        tlb
    }

    fn count(tlb: &Tlb, regime: Regime) -> usize {
        tlb.entries().filter(|entry| entry.0 == regime).count()
    }

    #[test]
    fn entries_of_all_sizes_apply_to_an_address() {
        let tlb = full();
        assert_eq!(tlb.lookup(VM, 0x20_0fff).count(), 4);
        assert_eq!(tlb.lookup(VM, 0x20_2000).count(), 3);
        assert_eq!(tlb.lookup(VM, 0x50_0000).count(), 1);
        assert_eq!(tlb.lookup(VM, 1 << 30).count(), 0);
        assert_eq!(tlb.lookup(Regime::Stage2 { vmid: 9 }, 0).count(), 0);
    }

    #[test]
    fn the_same_translation_is_held_once_and_a_different_one_beside_it() {
        let mut tlb = Tlb::default();
        tlb.insert(VM, leaf(0, 0x1000, 0x1000));
        tlb.insert(VM, leaf(0, 0x1000, 0x1000));
        assert_eq!(tlb.lookup(VM, 0).count(), 1);
        tlb.insert(VM, leaf(0, 0x1000, 0x2000));
        assert_eq!(tlb.lookup(VM, 0).count(), 2);
    }

    #[test]
    fn range_invalidation_reaches_larger_entries_and_spares_neighbours() {
        let mut tlb = full();
        tlb.invalidate(&Scope::Range { regime: VM, start: 0x20_0000, end: 0x20_1000 });
        assert_eq!(count(&tlb, VM), 1, "only the neighbouring page is left");
        assert_eq!(tlb.lookup(VM, 0x20_1000).count(), 1);
        assert_eq!((count(&tlb, OTHER), count(&tlb, Regime::El2)), (5, 5));
    }

    #[test]
    fn range_invalidation_ends_in_another_table() {
        let mut tlb = Tlb::default();
        let pages = [0x1f_e000, 0x1f_f000, 0x20_0000, 0x3f_f000, 0x40_0000, 0x40_1000];
        pages.into_iter().for_each(|ipa| tlb.insert(VM, leaf(ipa, 0x1000, 0)));
        tlb.invalidate(&Scope::Range { regime: VM, start: 0x1f_f000, end: 0x40_1000 });
        assert_eq!(tlb.entries().map(|entry| entry.1).collect::<Vec<_>>(), [0x1f_e000, 0x40_1000]);
        tlb.invalidate(&Scope::Range { regime: VM, start: 0x1f_e000, end: 0x1f_e000 });
        assert_eq!(count(&tlb, VM), 2, "no address, no entry");
    }

    #[test]
    fn regime_invalidation_spares_other_regimes() {
        let mut tlb = full();
        tlb.invalidate(&Scope::Regime(VM));
        assert_eq!((count(&tlb, VM), count(&tlb, OTHER), count(&tlb, Regime::El2)), (0, 5, 5));
    }

    #[test]
    fn invalidation_of_all_stage_2_spares_el2() {
        let mut tlb = full();
        tlb.invalidate(&Scope::AllStage2);
        assert_eq!((count(&tlb, VM), count(&tlb, OTHER), count(&tlb, Regime::El2)), (0, 0, 5));
    }
}
