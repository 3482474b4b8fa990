//! Memory: page frames, translation tables, regions, address spaces.
//!
//! One CPU at a time is in the kernel, with interrupts masked, so nothing here has a lock. A frame is used again only when
//! all CPUs have forgotten the page ([`space::AddressSpace`]).

pub mod frames;
pub mod regions;
pub mod space;
pub mod table;

pub use frames::{Frames, Holder};
pub use regions::{Prot, Regions};
pub use space::{AddressSpace, Backing, Fault};

/// Bytes of a page.
pub const PAGE: u64 = 4096;

/// A page frame number.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Pfn(pub u64);

impl Pfn {
    /// The frame that holds a physical address.
    pub const fn containing(address: u64) -> Self {
        Self(address / PAGE)
    }

    /// Physical address of the frame's first byte.
    pub const fn address(self) -> u64 {
        self.0.wrapping_mul(PAGE)
    }

    /// The frame `pages` further on.
    pub const fn plus(self, pages: u64) -> Self {
        Self(self.0.wrapping_add(pages))
    }
}

impl core::fmt::Debug for Pfn {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "pfn {:#x}", self.0)
    }
}

/// Rounds up to a page; `None` on overflow.
pub const fn page_up(value: u64) -> Option<u64> {
    match value.checked_add(PAGE - 1) {
        Some(sum) => Some(sum & !(PAGE - 1)),
        None => None,
    }
}

/// Rounds down to a page.
pub const fn page_down(value: u64) -> u64 {
    value & !(PAGE - 1)
}

/// Whether a value is a multiple of the page size.
pub const fn is_aligned(value: u64) -> bool {
    value.is_multiple_of(PAGE)
}

/// A part of a range of addresses that lies within one page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Address of its first byte.
    pub address: u64,
    /// Where it starts in the caller's buffer.
    pub offset: usize,
    /// Its length.
    pub length: usize,
}

/// Splits `[address, address + length)` at page boundaries; ends early where addresses would wrap.
pub fn pieces(address: u64, length: usize) -> impl Iterator<Item = Piece> {
    let mut offset = 0usize;
    core::iter::from_fn(move || {
        let left = length.checked_sub(offset).filter(|left| *left > 0)?;
        let address = address.checked_add(offset as u64)?;
        let length = left.min((PAGE - address % PAGE) as usize);
        let piece = Piece { address, offset, length };
        offset = offset.saturating_add(length);
        Some(piece)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_split_at_page_boundaries() {
        let mut pieces = pieces(0x1ff0, 0x1020);
        assert_eq!(pieces.next(), Some(Piece { address: 0x1ff0, offset: 0, length: 0x10 }));
        assert_eq!(pieces.next(), Some(Piece { address: 0x2000, offset: 0x10, length: 0x1000 }));
        assert_eq!(pieces.next(), Some(Piece { address: 0x3000, offset: 0x1010, length: 0x10 }));
        assert_eq!(pieces.next(), None);
    }

    #[test]
    fn rounding_up_at_the_end_of_the_address_space_is_refused() {
        assert_eq!(page_up(u64::MAX), None);
        assert_eq!(page_up(1), Some(PAGE));
        assert_eq!(page_down(PAGE + 1), PAGE);
    }
}
