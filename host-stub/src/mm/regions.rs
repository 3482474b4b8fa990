//! Regions of an address space: which addresses a program has mapped, and onto what.
//!
//! Pure book-keeping, no tables. Regions never overlap; neighbours are not merged.

use alloc::collections::BTreeMap;
use alloc::vec::Vec;
use core::ops::Range;

use super::{PAGE, is_aligned};

bitflags::bitflags! {
    /// What a program may do in a region (Linux's `PROT_*`).
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Prot: u64 {
        /// Loads.
        const READ = 1;
        /// Stores.
        const WRITE = 2;
        /// Instruction fetches.
        const EXEC = 4;
    }
}

/// Regions that a program may have (a removal may leave one more).
pub const LIMIT: usize = 16384;

/// What a region is mapped onto: it can be cut.
pub trait Cut: Clone {
    /// The same thing, from `pages` further on.
    fn advanced(&self, pages: u64) -> Self;
}

/// One region.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Region<B> {
    /// First address.
    pub start: u64,
    /// First address behind it.
    pub end: u64,
    /// What the program may do.
    pub prot: Prot,
    /// What is there.
    pub backing: B,
}

/// Why a region was not added.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RegionError {
    /// It is empty, unaligned or outside the addresses of programs.
    Invalid,
    /// Something is there.
    Overlap,
    /// No gap is large enough.
    Full,
}

/// The regions of one address space.
#[derive(Debug)]
pub struct Regions<B> {
    limits: Range<u64>,
    regions: BTreeMap<u64, Region<B>>,
}

impl<B: Cut> Regions<B> {
    /// No regions yet, within these addresses.
    pub fn new(limits: Range<u64>) -> Self {
        Self { limits, regions: BTreeMap::new() }
    }

    /// Checks that a range is one that could be mapped.
    pub fn check(&self, range: &Range<u64>) -> Result<(), RegionError> {
        let fits = range.start < range.end
            && range.start >= self.limits.start
            && range.end <= self.limits.end
            && is_aligned(range.start)
            && is_aligned(range.end);
        if fits { Ok(()) } else { Err(RegionError::Invalid) }
    }

    /// Adds a region where nothing is.
    pub fn insert(&mut self, range: Range<u64>, prot: Prot, backing: B) -> Result<(), RegionError> {
        self.check(&range)?;
        if self.regions.len() >= LIMIT {
            return Err(RegionError::Full);
        }
        if self.overlapping(&range).next().is_some() {
            return Err(RegionError::Overlap);
        }
        let region = Region { start: range.start, end: range.end, prot, backing };
        self.regions.insert(range.start, region);
        Ok(())
    }

    /// Removes whatever lies in the range, cutting regions that reach beyond it. Returns the pieces.
    pub fn remove(&mut self, range: &Range<u64>) -> Vec<Region<B>> {
        let starts: Vec<u64> = self.overlapping(range).map(|region| region.start).collect();
        let mut removed = Vec::new();
        for start in starts {
            let Some(region) = self.regions.remove(&start) else { continue };
            let (before, middle, after) = cut(region, range);
            for part in [before, after].into_iter().flatten() {
                self.regions.insert(part.start, part);
            }
            removed.extend(middle);
        }
        removed
    }

    /// The region that holds an address.
    pub fn find(&self, address: u64) -> Option<&Region<B>> {
        self.regions
            .range(..=address)
            .next_back()
            .map(|(_, region)| region)
            .filter(|region| address < region.end)
    }

    /// The regions that share an address with the range, in order.
    pub fn overlapping(&self, range: &Range<u64>) -> impl Iterator<Item = &Region<B>> {
        let first = self.find(range.start).map_or(range.start, |region| region.start);
        let range = range.clone();
        let last = range.end.max(first);
        self.regions
            .range(first..last)
            .map(|(_, region)| region)
            .filter(move |region| region.end > range.start)
    }

    /// All regions, in order.
    pub fn iter(&self) -> impl Iterator<Item = &Region<B>> {
        self.regions.values()
    }

    /// The lowest gap of `length` bytes at or above `from`.
    pub fn gap(&self, from: u64, length: u64) -> Result<u64, RegionError> {
        if length == 0 || !is_aligned(length) {
            return Err(RegionError::Invalid);
        }
        let mut start = from.max(self.limits.start);
        for region in self.regions.values() {
            let end = start.checked_add(length).ok_or(RegionError::Full)?;
            if region.end > start && region.start < end {
                start = region.end;
            }
        }
        let end = start.checked_add(length).ok_or(RegionError::Full)?;
        if end <= self.limits.end { Ok(start) } else { Err(RegionError::Full) }
    }
}

type Parts<B> = (Option<Region<B>>, Option<Region<B>>, Option<Region<B>>);

/// Cuts a region into what lies before, in and after the range.
fn cut<B: Cut>(region: Region<B>, range: &Range<u64>) -> Parts<B> {
    let part = |start: u64, end: u64| {
        (start < end).then(|| Region {
            start,
            end,
            prot: region.prot,
            backing: region.backing.advanced(start.saturating_sub(region.start) / PAGE),
        })
    };
    (
        part(region.start, region.end.min(range.start)),
        part(region.start.max(range.start), region.end.min(range.end)),
        part(region.start.max(range.end), region.end),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Clone, Debug, PartialEq, Eq)]
    struct Offset(u64);

    impl Cut for Offset {
        fn advanced(&self, pages: u64) -> Self {
            Self(self.0 + pages)
        }
    }

    fn regions() -> Regions<Offset> {
        let mut regions = Regions::new(0x1000..0x10_0000);
        regions.insert(0x4000..0x8000, Prot::READ, Offset(10)).unwrap();
        regions.insert(0xa000..0xc000, Prot::READ | Prot::WRITE, Offset(0)).unwrap();
        regions
    }

    #[test]
    fn a_region_over_another_is_refused_and_changes_nothing() {
        let mut regions = regions();
        for range in [0x3000..0x5000, 0x5000..0x6000, 0x7000..0x9000, 0x3000..0xd000, 0x4000..0x8000] {
            assert_eq!(regions.insert(range, Prot::READ, Offset(0)), Err(RegionError::Overlap));
        }
        assert_eq!(regions.iter().count(), 2);
        regions.insert(0x8000..0xa000, Prot::READ, Offset(0)).unwrap();
    }

    #[test]
    fn absurd_ranges_are_refused() {
        let mut regions = regions();
        let absurd = [
            (0, 0x1000),
            (0x2000, 0x2000),
            (0x3000, 0x2000),
            (0x2001, 0x3000),
            (0x2000, 0x2fff),
            (0xf_f000, 0x10_1000),
        ];
        for (start, end) in absurd {
            let range = Range { start, end };
            assert_eq!(regions.insert(range, Prot::READ, Offset(0)), Err(RegionError::Invalid));
        }
    }

    #[test]
    fn removing_the_middle_leaves_both_ends_with_their_offsets() {
        let mut regions = regions();
        let removed = regions.remove(&(0x5000..0x7000));
        assert_eq!(removed, [Region { start: 0x5000, end: 0x7000, prot: Prot::READ, backing: Offset(11) }]);
        assert_eq!(regions.find(0x4fff).unwrap().backing, Offset(10));
        assert!(regions.find(0x5000).is_none());
        assert_eq!(regions.find(0x7000).unwrap().backing, Offset(13));
    }

    #[test]
    fn one_removal_spans_several_regions_and_the_gap_between() {
        let mut regions = regions();
        let removed = regions.remove(&(0x7000..0xb000));
        let spans: Vec<_> = removed.iter().map(|region| (region.start, region.end)).collect();
        assert_eq!(spans, [(0x7000, 0x8000), (0xa000, 0xb000)]);
        assert_eq!(
            regions.iter().map(|region| (region.start, region.end)).collect::<Vec<_>>(),
            [(0x4000, 0x7000), (0xb000, 0xc000)]
        );
    }

    #[test]
    fn removing_where_nothing_is_returns_nothing() {
        assert!(regions().remove(&(0x8000..0xa000)).is_empty());
        assert!(regions().remove(&(0x1000..0x4000)).is_empty());
    }

    #[test]
    fn the_lowest_gap_that_is_large_enough_is_found() {
        let regions = regions();
        assert_eq!(regions.gap(0x1000, 0x3000), Ok(0x1000));
        assert_eq!(regions.gap(0x2000, 0x2000), Ok(0x2000));
        assert_eq!(regions.gap(0x2000, 0x3000), Ok(0xc000));
        assert_eq!(regions.gap(0x5000, 0x2000), Ok(0x8000));
        assert_eq!(regions.gap(0x1000, 0x10_0000), Err(RegionError::Full));
        assert_eq!(regions.gap(0x1000, !0xfff), Err(RegionError::Full));
    }
}
