//! The map of memory that may change hands, fixed at boot.
//!
//! Only RAM that no one else claims is in it: flash, firmware memory and no-map ranges of the device tree are
//! not, so they can never be donated, shared or taken for a table.

#![forbid(unsafe_code)]

use crate::addr::{Pages, Pfn};
use arrayvec::ArrayVec;

/// Regions that a map can hold.
pub const MAX_REGIONS: usize = 32;

/// Why pages are no memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MemoryError {
    /// The range runs over the end of a region.
    BadRange,
    /// The range begins outside memory.
    NotMemory,
}

/// RAM, as sorted regions that do not overlap or touch.
#[derive(Clone, Debug, Default)]
pub struct MemoryMap {
    regions: ArrayVec<Pages<Pfn>, MAX_REGIONS>,
}

/// A map has more regions than [`MAX_REGIONS`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TooManyRegions;

impl MemoryMap {
    /// Adds RAM; regions that touch or overlap become one.
    pub fn add(&mut self, pages: Pages<Pfn>) -> Result<(), TooManyRegions> {
        let touches = |region: &Pages<Pfn>| {
            region.start().as_u64() <= pages.end() && pages.start().as_u64() <= region.end()
        };
        let joined = self.regions.iter().copied().filter(|region| touches(region)).fold(pages, join);
        self.regions.retain(|region| !touches(region));
        let at = self.regions.iter().take_while(|region| region.start() < joined.start()).count();
        self.regions.try_insert(at, joined).map_err(|_| TooManyRegions)
    }

    /// Takes pages out of it.
    pub fn remove(&mut self, pages: Pages<Pfn>) -> Result<(), TooManyRegions> {
        let mut rest = ArrayVec::new();
        for region in &self.regions {
            let before = pages.start().as_u64().saturating_sub(region.start().as_u64());
            let parts = if region.overlaps(pages) {
                let behind = region.end().saturating_sub(pages.end());
                [Pages::new(region.start(), before), Pages::from_raw(pages.end(), behind)]
            } else {
                [Some(*region), None]
            };
            for part in parts.into_iter().flatten() {
                rest.try_push(part).map_err(|_| TooManyRegions)?;
            }
        }
        self.regions = rest;
        Ok(())
    }

    /// Checks that a range lies in one region.
    pub fn check(&self, pages: Pages<Pfn>) -> Result<(), MemoryError> {
        match self.regions.iter().find(|region| region.contains(pages.start())) {
            Some(region) if pages.end() <= region.end() => Ok(()),
            Some(_) => Err(MemoryError::BadRange),
            None => Err(MemoryError::NotMemory),
        }
    }

    /// Whether a page is memory.
    pub fn contains(&self, page: Pfn) -> bool {
        self.regions.iter().any(|region| region.contains(page))
    }

    /// The regions, in order.
    pub fn regions(&self) -> &[Pages<Pfn>] {
        &self.regions
    }
}

/// The run from the first page of either to the last of either.
fn join(a: Pages<Pfn>, b: Pages<Pfn>) -> Pages<Pfn> {
    let start = a.start().min(b.start());
    let end = a.end().max(b.end());
    Pages::new(start, end.saturating_sub(start.as_u64())).unwrap_or(a)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(start: u64, count: u64) -> Pages<Pfn> {
        Pages::from_raw(start, count).unwrap()
    }

    #[test]
    fn regions_that_touch_become_one() {
        let mut map = MemoryMap::default();
        for region in [run(100, 10), run(0, 10), run(10, 90)] {
            map.add(region).unwrap();
        }
        assert_eq!(map.regions(), [run(0, 110)]);
    }

    #[test]
    fn a_hole_is_no_memory_and_a_range_over_it_straddles() {
        let mut map = MemoryMap::default();
        map.add(run(0, 100)).unwrap();
        map.remove(run(40, 10)).unwrap();
        assert_eq!(map.regions(), [run(0, 40), run(50, 50)]);
        assert_eq!(map.check(run(0, 40)), Ok(()));
        assert_eq!(map.check(run(39, 2)), Err(MemoryError::BadRange));
        assert_eq!(map.check(run(39, 20)), Err(MemoryError::BadRange));
        assert_eq!(map.check(run(45, 1)), Err(MemoryError::NotMemory));
        assert_eq!(map.check(run(99, 2)), Err(MemoryError::BadRange));
        assert_eq!(map.check(run(200, 1)), Err(MemoryError::NotMemory));
    }

    #[test]
    fn taking_out_an_edge_or_everything_leaves_no_empty_region() {
        let mut map = MemoryMap::default();
        map.add(run(10, 10)).unwrap();
        map.remove(run(0, 12)).unwrap();
        assert_eq!(map.regions(), [run(12, 8)]);
        map.remove(run(0, 100)).unwrap();
        assert_eq!(map.regions(), []);
    }
}
