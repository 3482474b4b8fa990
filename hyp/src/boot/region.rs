//! Runs of bytes of physical memory.

use crate::addr::{PAGE_SIZE, Pages, Pfn, PhysAddr};
use core::fmt;

/// A run of bytes: never empty, and its last byte has a 48-bit address.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Region {
    start: PhysAddr,
    size: u64,
}

impl Region {
    /// Makes a run from numbers that come from outside; `None` if it is empty or leaves the address space.
    pub fn new(start: u64, size: u64) -> Option<Self> {
        let start = PhysAddr::new(start)?;
        start.checked_add(size.checked_sub(1)?)?;
        Some(Self { start, size })
    }

    /// The run that some pages make.
    pub fn of_pages(pages: Pages<Pfn>) -> Self {
        // A page number has 36 bits, so neither product overflows.
        Self { start: pages.start().base(), size: pages.count().saturating_mul(PAGE_SIZE) }
    }

    /// Its first byte.
    pub fn start(self) -> u64 {
        self.start.as_u64()
    }

    /// Its number of bytes, at least 1.
    pub fn size(self) -> u64 {
        self.size
    }

    /// The address of the byte behind it.
    pub fn end(self) -> u64 {
        // Cannot overflow: the last byte is within 48 bits.
        self.start().saturating_add(self.size)
    }

    /// Whether the runs have a byte in common.
    pub fn overlaps(self, other: Self) -> bool {
        self.start() < other.end() && other.start() < self.end()
    }

    /// Whether all of another run belongs to this one.
    pub fn covers(self, other: Self) -> bool {
        self.start() <= other.start() && other.end() <= self.end()
    }

    /// The pages that lie in it whole; `None` if there are none.
    pub fn whole_pages(self) -> Option<Pages<Pfn>> {
        let first = self.start().div_ceil(PAGE_SIZE);
        Pages::from_raw(first, (self.end() / PAGE_SIZE).checked_sub(first)?)
    }

    /// The pages that it touches.
    pub fn touched_pages(self) -> Option<Pages<Pfn>> {
        let first = self.start() / PAGE_SIZE;
        Pages::from_raw(first, self.end().div_ceil(PAGE_SIZE).checked_sub(first)?)
    }

    /// The run from the same start with at least `size` bytes; `None` if it leaves the address space.
    pub fn grown_to(self, size: u64) -> Option<Self> {
        Self::new(self.start(), self.size.max(size))
    }
}

impl fmt::Debug for Region {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

impl fmt::Display for Region {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}..{:#x}", self.start(), self.end())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_that_is_empty_or_leaves_the_address_space_cannot_be_built() {
        for (start, size) in [(0, 0), (1 << 48, 1), (0, (1 << 48) + 1), (u64::MAX, 1), (4096, u64::MAX)] {
            assert_eq!(Region::new(start, size), None, "{start:#x} {size:#x}");
        }
        assert_eq!(Region::new(0, 1 << 48).map(Region::end), Some(1 << 48));
    }

    #[test]
    fn pages_are_rounded_inwards_or_outwards() {
        let run = Region::new(0x1800, 0x2000).unwrap();
        assert_eq!(run.whole_pages(), Pages::from_raw(2, 1));
        assert_eq!(run.touched_pages(), Pages::from_raw(1, 3));
        assert_eq!(Region::new(0x1800, 0x800).unwrap().whole_pages(), Pages::from_raw(2, 0));
        assert_eq!(Region::new(0x1001, 0x10).unwrap().whole_pages(), None);
    }

    #[test]
    fn runs_that_touch_do_not_overlap() {
        let run = |start, size| Region::new(start, size).unwrap();
        assert!(!run(0, 16).overlaps(run(16, 16)) && !run(16, 16).overlaps(run(0, 16)));
        assert!(run(0, 17).overlaps(run(16, 16)));
        assert!(run(0, 16).covers(run(0, 16)) && !run(0, 16).covers(run(8, 9)));
    }
}
