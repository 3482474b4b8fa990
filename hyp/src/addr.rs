//! Addresses and page numbers, one type for each address space, with checked arithmetic only.
//!
//! A byte address is always inside 48 bits and a frame number inside 36: a value that does not fit cannot be
//! built, so nothing behind this module shifts or adds its way out of an address space (invariant I8).

#![forbid(unsafe_code)]

use core::fmt;

/// log2 of the page size.
pub const PAGE_SHIFT: u32 = 12;
/// Bytes of a page. Deed uses the 4 KiB granule only.
pub const PAGE_SIZE: u64 = 1 << PAGE_SHIFT;
/// Bits of an address, whatever its space (VMSAv8-64 without FEAT_LPA2).
pub const ADDRESS_BITS: u32 = 48;

const MAX_ADDRESS: u64 = (1 << ADDRESS_BITS) - 1;
const MAX_FRAME: u64 = MAX_ADDRESS >> PAGE_SHIFT;

macro_rules! address {
    ($(#[$doc:meta])* $name:ident, $prefix:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(u64);

        impl $name {
            /// Makes an address; `None` beyond 48 bits.
            pub const fn new(address: u64) -> Option<Self> {
                if address <= MAX_ADDRESS { Some(Self(address)) } else { None }
            }

            /// The number.
            pub const fn as_u64(self) -> u64 {
                self.0
            }

            /// The address `bytes` further on; `None` beyond 48 bits.
            pub const fn checked_add(self, bytes: u64) -> Option<Self> {
                match self.0.checked_add(bytes) {
                    Some(sum) => Self::new(sum),
                    None => None,
                }
            }

            /// Bytes from the start of its page.
            pub const fn page_offset(self) -> u64 {
                self.0 % PAGE_SIZE
            }

            /// Whether it is the first byte of a page.
            pub const fn is_page_aligned(self) -> bool {
                self.page_offset() == 0
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!($prefix, ":{:#x}"), self.0)
            }
        }
    };
}

address!(
    /// A physical address.
    PhysAddr,
    "pa"
);
address!(
    /// An intermediate physical address: what a guest or the host takes for a physical one.
    Ipa,
    "ipa"
);
address!(
    /// A virtual address of EL2.
    HypVa,
    "va"
);

/// A page number of some address space.
pub trait Frame: Copy + Ord + fmt::Debug {
    /// Makes a page number; `None` beyond 36 bits.
    fn new(number: u64) -> Option<Self>;
    /// The number.
    fn as_u64(self) -> u64;

    /// The page `pages` further on; `None` beyond 36 bits.
    fn checked_add(self, pages: u64) -> Option<Self> {
        self.as_u64().checked_add(pages).and_then(Self::new)
    }
}

macro_rules! frame {
    ($(#[$doc:meta])* $name:ident, $address:ident, $prefix:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(u64);

        impl $name {
            /// Makes a page number; `None` beyond 36 bits.
            pub const fn new(number: u64) -> Option<Self> {
                if number <= MAX_FRAME { Some(Self(number)) } else { None }
            }

            /// The page that an address lies in.
            pub const fn containing(address: $address) -> Self {
                Self(address.as_u64() >> PAGE_SHIFT)
            }

            /// The number.
            pub const fn as_u64(self) -> u64 {
                self.0
            }

            /// Address of its first byte.
            pub const fn base(self) -> $address {
                $address(self.0 << PAGE_SHIFT)
            }
        }

        impl Frame for $name {
            fn new(number: u64) -> Option<Self> {
                Self::new(number)
            }

            fn as_u64(self) -> u64 {
                self.0
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!($prefix, ":{:#x}"), self.0)
            }
        }
    };
}

frame!(
    /// A physical page.
    Pfn,
    PhysAddr,
    "pfn"
);
frame!(
    /// A page of intermediate physical space. The host's is mapped one to one: its Gfn n is Pfn n.
    Gfn,
    Ipa,
    "gfn"
);
frame!(
    /// A virtual page of EL2.
    Vpn,
    HypVa,
    "vpn"
);

impl PhysAddr {
    /// The address of this word and of those behind it, `count` in all, as far as there are so many.
    pub fn words(self, count: u64) -> impl Iterator<Item = Self> {
        let behind = MAX_ADDRESS.wrapping_sub(self.0) / 8;
        (0..count.min(behind.wrapping_add(1)))
            .map(move |index| Self(self.0.wrapping_add(index.wrapping_mul(8))))
    }
}

impl Pfn {
    /// Address of its word `index`, counted from 0 and modulo 512.
    pub const fn word(self, index: u64) -> PhysAddr {
        // The page leaves the low 12 bits free, and the mask keeps to them.
        PhysAddr(self.0 << PAGE_SHIFT | (index << 3 & (PAGE_SIZE - 8)))
    }

    /// The same number as a page of the host's intermediate physical space.
    pub const fn identity(self) -> Gfn {
        Gfn(self.0)
    }

    /// The page of EL2's identity map that shows this page.
    pub const fn identity_va(self) -> Vpn {
        Vpn(self.0)
    }
}

impl Vpn {
    /// The physical page that EL2's identity map shows at this page.
    pub const fn identity(self) -> Pfn {
        Pfn(self.0)
    }
}

impl Gfn {
    /// The physical page that the host sees at this page of its space.
    pub const fn identity(self) -> Pfn {
        Pfn(self.0)
    }
}

/// A run of pages: never empty, and its end is inside the address space.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Pages<F> {
    start: F,
    count: u64,
}

impl<F: Frame> Pages<F> {
    /// Makes a run; `None` if it is empty or leaves the address space.
    pub fn new(start: F, count: u64) -> Option<Self> {
        // One comparison for both ways to be no run: 0 pages less one is more than any room.
        let room = MAX_FRAME.wrapping_sub(start.as_u64());
        if count.wrapping_sub(1) <= room { Some(Self { start, count }) } else { None }
    }

    /// Makes a run of numbers that come from outside.
    pub fn from_raw(start: u64, count: u64) -> Option<Self> {
        Self::new(F::new(start)?, count)
    }

    /// The run of one page.
    pub fn one(frame: F) -> Self {
        Self { start: frame, count: 1 }
    }

    /// Its first page.
    pub const fn start(self) -> F {
        self.start
    }

    /// Number of pages, at least 1.
    pub const fn count(self) -> u64 {
        self.count
    }

    /// Number of the first page behind it.
    pub fn end(self) -> u64 {
        // Cannot overflow: the last page is within 36 bits.
        self.start.as_u64().wrapping_add(self.count)
    }

    /// Whether a page belongs to it.
    pub fn contains(self, frame: F) -> bool {
        frame.as_u64().wrapping_sub(self.start.as_u64()) < self.count
    }

    /// Whether all of another run belongs to it.
    pub fn covers(self, other: Self) -> bool {
        self.start <= other.start && other.end() <= self.end()
    }

    /// Whether the runs have a page in common.
    pub fn overlaps(self, other: Self) -> bool {
        self.start.as_u64() < other.end() && other.start.as_u64() < self.end()
    }

    /// Its first `count` pages, or all of it.
    pub fn truncated(self, count: u64) -> Self {
        Self { start: self.start, count: self.count.min(count.max(1)) }
    }

    /// What is left behind the first `count` pages; `None` if nothing.
    pub fn advanced(self, count: u64) -> Option<Self> {
        Self::new(self.start.checked_add(count)?, self.count.checked_sub(count)?)
    }

    /// The page `offset` pages behind the first; `None` outside the run.
    pub fn get(self, offset: u64) -> Option<F> {
        if offset < self.count { self.start.checked_add(offset) } else { None }
    }

    /// All its pages.
    pub fn iter(self) -> impl Iterator<Item = F> {
        (self.start.as_u64()..self.end()).filter_map(F::new)
    }
}

impl Pages<Pfn> {
    /// The same numbers as pages of the host's intermediate physical space.
    pub const fn identity(self) -> Pages<Gfn> {
        Pages { start: self.start.identity(), count: self.count }
    }

    /// The pages of EL2's identity map that show these pages.
    pub const fn identity_va(self) -> Pages<Vpn> {
        Pages { start: self.start.identity_va(), count: self.count }
    }
}

impl Pages<Gfn> {
    /// The physical pages that the host sees there.
    pub const fn identity(self) -> Pages<Pfn> {
        Pages { start: self.start.identity(), count: self.count }
    }
}

impl<F: Frame> fmt::Debug for Pages<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}+{:#x}", self.start, self.count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_that_is_empty_or_overflows_cannot_be_built() {
        for (start, count) in
            [(0, 0), (0, 1 << 52), (0, u64::MAX), (MAX_FRAME, 2), (MAX_FRAME + 1, 1), (u64::MAX, 1)]
        {
            assert_eq!(Pages::<Pfn>::from_raw(start, count), None, "{start:#x} {count:#x}");
        }
        assert!(Pages::<Pfn>::from_raw(MAX_FRAME, 1).is_some());
    }

    #[test]
    fn advancing_by_the_whole_run_leaves_nothing() {
        let run = Pages::<Gfn>::from_raw(8, 4).unwrap();
        assert_eq!(run.advanced(4), None);
        assert_eq!(run.advanced(1), Pages::from_raw(9, 3));
        assert_eq!(run.get(3), Gfn::new(11));
        assert_eq!(run.get(4), None);
    }

    #[test]
    fn runs_that_touch_do_not_overlap() {
        let a = Pages::<Pfn>::from_raw(0, 4).unwrap();
        let b = Pages::<Pfn>::from_raw(4, 4).unwrap();
        assert!(!a.overlaps(b) && !b.overlaps(a));
        assert!(a.overlaps(Pages::from_raw(3, 1).unwrap()));
        assert!(a.covers(Pages::from_raw(3, 1).unwrap()) && !a.covers(b));
    }

    #[test]
    fn words_end_where_the_address_space_does() {
        let addresses = |start, count| {
            PhysAddr::new(start).unwrap().words(count).map(PhysAddr::as_u64).collect::<Vec<_>>()
        };
        assert_eq!(addresses(0xff8, 3), [0xff8, 0x1000, 0x1008]);
        assert_eq!(addresses(MAX_ADDRESS - 15, 4), [MAX_ADDRESS - 15, MAX_ADDRESS - 7]);
        assert_eq!(addresses(0, 0), []);
    }

    #[test]
    fn an_address_beyond_48_bits_cannot_be_built() {
        assert_eq!(PhysAddr::new(1 << 48), None);
        assert_eq!(Ipa::new(MAX_ADDRESS).and_then(|ipa| ipa.checked_add(1)), None);
        assert_eq!(Ipa::new(0x1fff).map(|ipa| ipa.page_offset()), Some(0xfff));
    }
}
