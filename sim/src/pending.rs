//! What an invalidation still has to cover before hardware has forgotten a translation that was taken away.

use crate::tlb::Scope;
use crate::walk::Regime;

/// A range of addresses, start and end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Range {
    pub(crate) start: u64,
    pub(crate) end: u64,
}

impl Range {
    /// Returns the range of `len` bytes from `start`.
    pub(crate) fn new(start: u64, len: u64) -> Self {
        Self { start, end: start.saturating_add(len) }
    }

    /// All addresses.
    pub(crate) const ALL: Self = Self { start: 0, end: u64::MAX };

    /// Tells whether it has no address.
    pub(crate) fn is_empty(&self) -> bool {
        self.start >= self.end
    }

    /// Tells whether two ranges have an address in common.
    pub(crate) fn overlaps(&self, other: &Self) -> bool {
        self.start < other.end && other.start < self.end
    }
}

/// A list of ranges in which neighbours that meet are one.
fn push(list: &mut Vec<Range>, range: Range) {
    match list.last_mut() {
        Some(last) if last.end == range.start => last.end = range.end,
        _ => list.push(range),
    }
}

/// What has been taken away from a regime and may still be in TLBs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Pending {
    /// Whose translations.
    pub(crate) regime: Regime,
    /// Input addresses of leaves: every one of them has to be invalidated.
    leaves: Vec<Range>,
    /// Ranges that a table pointer covered: one address of each has to be invalidated.
    pointers: Vec<Range>,
    /// Output addresses of the leaves.
    outputs: Vec<Range>,
}

impl Pending {
    /// Returns an account with nothing in it.
    pub(crate) fn new(regime: Regime) -> Self {
        Self { regime, leaves: Vec::new(), pointers: Vec::new(), outputs: Vec::new() }
    }

    /// Adds a leaf that translates `size` bytes from `ia` to `pa`.
    pub(crate) fn add_leaf(&mut self, ia: u64, pa: u64, size: u64) {
        push(&mut self.leaves, Range::new(ia, size));
        push(&mut self.outputs, Range::new(pa, size));
    }

    /// Adds a table pointer that covers `size` bytes from `ia`.
    pub(crate) fn add_pointer(&mut self, ia: u64, size: u64) {
        self.pointers.push(Range::new(ia, size));
    }

    /// Adds everything of another account of the same regime.
    pub(crate) fn add(&mut self, other: &Self) {
        for &range in &other.leaves {
            push(&mut self.leaves, range);
        }
        self.pointers.extend(&other.pointers);
        for &range in &other.outputs {
            push(&mut self.outputs, range);
        }
    }

    /// Applies an invalidation; returns whether anything is left to invalidate.
    pub(crate) fn apply(&mut self, scope: &Scope) -> bool {
        if let Some(hit) = scope.range_in(self.regime) {
            self.pointers.retain(|range| !range.overlaps(&hit));
            let mut left = Vec::new();
            for range in &self.leaves {
                if !range.overlaps(&hit) {
                    left.push(*range);
                    continue;
                }
                if range.start < hit.start {
                    left.push(Range { start: range.start, end: hit.start });
                }
                if hit.end < range.end {
                    left.push(Range { start: hit.end, end: range.end });
                }
            }
            self.leaves = left;
        }
        !self.is_empty()
    }

    /// Tells whether nothing is left to invalidate.
    pub(crate) fn is_empty(&self) -> bool {
        self.leaves.is_empty() && self.pointers.is_empty()
    }

    /// Returns the output addresses of what was taken away.
    pub(crate) fn outputs(&self) -> &[Range] {
        &self.outputs
    }

    /// Returns the first address of `range` that a revoked translation may still reach.
    pub(crate) fn reaches(&self, range: &Range) -> Option<u64> {
        self.outputs.iter().find(|output| output.overlaps(range)).map(|output| output.start.max(range.start))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const VM: Regime = Regime::Stage2 { vmid: 1 };

    fn range(start: u64, end: u64) -> Scope {
        Scope::Range { regime: VM, start, end }
    }

    #[test]
    fn every_address_of_a_leaf_has_to_be_invalidated() {
        let mut pending = Pending::new(VM);
        pending.add_leaf(0x1000, 0x9000, 0x4000);
        assert!(pending.apply(&range(0x2000, 0x3000)));
        assert!(pending.apply(&range(0x1000, 0x2000)));
        assert!(pending.apply(&range(0x4000, 0x9000)));
        assert!(!pending.apply(&range(0x3000, 0x4000)));
    }

    #[test]
    fn one_address_is_enough_for_a_table_pointer() {
        let mut pending = Pending::new(VM);
        pending.add_pointer(0, 0x20_0000);
        assert!(pending.apply(&range(0x20_0000, 0x20_1000)));
        assert!(!pending.apply(&range(0x1f_f000, 0x20_0000)));
    }

    #[test]
    fn ranges_that_only_meet_do_not_overlap() {
        let range = Range::new(0x1000, 0x1000);
        assert!(range.overlaps(&Range::new(0x1fff, 1)) && range.overlaps(&Range::new(0, 0x1001)));
        assert!(!range.overlaps(&Range::new(0x2000, 1)) && !range.overlaps(&Range::new(0, 0x1000)));
    }

    #[test]
    fn added_account_has_to_be_covered_as_well() {
        let mut other = Pending::new(VM);
        other.add_pointer(0, 0x1000);
        other.add_leaf(0x1000, 0x9000, 0x1000);
        let mut pending = Pending::new(VM);
        pending.add(&other);
        assert!(pending.reaches(&Range::new(0x9fff, 1)).is_some());
        assert!(pending.apply(&range(0x1000, 0x2000)));
        assert!(!pending.apply(&range(0, 0x1000)));
    }

    #[test]
    fn another_regime_does_not_count() {
        let mut pending = Pending::new(VM);
        pending.add_leaf(0, 0, 0x1000);
        assert!(pending.apply(&Scope::Regime(Regime::El2)));
        assert!(pending.apply(&Scope::Regime(Regime::Stage2 { vmid: 2 })));
        assert!(!pending.clone().apply(&Scope::AllStage2));
        assert!(!pending.apply(&Scope::Regime(VM)));
    }

    #[test]
    fn meeting_leaves_become_one_range() {
        let mut pending = Pending::new(VM);
        pending.add_leaf(0x1000, 0x8000, 0x1000);
        pending.add_leaf(0x2000, 0x9000, 0x1000);
        assert_eq!(pending.leaves, [Range { start: 0x1000, end: 0x3000 }]);
        assert_eq!(pending.reaches(&Range::new(0x9000, 0x1000)), Some(0x9000));
        assert_eq!(pending.reaches(&Range::new(0xa000, 0x1000)), None);
    }
}
