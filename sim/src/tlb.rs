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

/// The entries of one regime: by level of the descriptor they come from, then by first input address.
type Entries = [BTreeMap<u64, Vec<Cached>>; 4];

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
    /// Returns the addresses of `regime` that the invalidation applies to, as start and end.
    pub(crate) fn range_in(&self, regime: Regime) -> Option<(u64, u64)> {
        match *self {
            Scope::Range { regime: hit, start, end } if hit == regime => Some((start, end)),
            Scope::Regime(hit) if hit == regime => Some((0, u64::MAX)),
            Scope::AllStage2 if regime != Regime::El2 => Some((0, u64::MAX)),
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
        let entries = self.regimes.entry(regime).or_default();
        let Some(by_address) = entries.get_mut(usize::from(level)) else { return };
        let same_address = by_address.entry(ia).or_default();
        if !same_address.contains(&cached) {
            same_address.push(cached);
        }
    }

    /// Returns every entry that applies to an input address, older before newer within a size.
    pub(crate) fn lookup(&self, regime: Regime, ia: u64) -> impl Iterator<Item = Cached> {
        let entries = self.regimes.get(&regime);
        (0u8..).zip(entries.into_iter().flatten()).flat_map(move |(level, by_address)| {
            by_address.get(&(ia & !(span(level) - 1))).into_iter().flatten().copied()
        })
    }

    /// Returns the entries of a regime that cover any address of a range, with first input address and size.
    pub(crate) fn overlapping(
        &self,
        regime: Regime,
        range: &Range,
    ) -> impl Iterator<Item = (u64, u64, Cached)> {
        let entries = self.regimes.get(&regime);
        let Range { start, end } = *range;
        (0u8..).zip(entries.into_iter().flatten()).flat_map(move |(level, by_address)| {
            by_address.range(start & !(span(level) - 1)..end).flat_map(move |(&ia, same_address)| {
                same_address.iter().map(move |&cached| (ia, span(level), cached))
            })
        })
    }

    /// Returns every entry, with its regime, first input address and size.
    pub(crate) fn entries(&self) -> impl Iterator<Item = (Regime, u64, u64, Cached)> {
        self.regimes.iter().flat_map(|(&regime, entries)| {
            (0u8..).zip(entries).flat_map(move |(level, by_address)| {
                by_address.iter().flat_map(move |(&ia, same_address)| {
                    same_address.iter().map(move |&cached| (regime, ia, span(level), cached))
                })
            })
        })
    }

    /// Forgets the entries that a TLBI reaches: those of which any address is in its scope.
    pub(crate) fn invalidate(&mut self, scope: &Scope) {
        self.regimes.retain(|&regime, entries| {
            let Some((start, end)) = scope.range_in(regime) else { return true };
            for (level, by_address) in (0u8..).zip(entries.iter_mut()) {
                let first = start & !(span(level) - 1);
                if (first, end) == (0, u64::MAX) {
                    by_address.clear();
                    continue;
                }
                let hit: Vec<u64> = by_address.range(first..end).map(|(&ia, _)| ia).collect();
                for ia in hit {
                    by_address.remove(&ia);
                }
            }
            entries.iter().any(|by_address| !by_address.is_empty())
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
