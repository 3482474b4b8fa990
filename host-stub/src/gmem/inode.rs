//! The inode: the pages of one guest_memfd.
//!
//! Owns the frames in its content. Per page it knows the frame, how many pins hold it, and whether an
//! unshare is draining it; who may access it is EL2's to say.

use alloc::collections::BTreeMap;
use core::cell::RefCell;
use core::ops::Range;

use abi::HostCall;

use crate::errno::Errno;
use crate::host::Host;
use crate::mm::{Holder, PAGE, Pfn, is_aligned};

bitflags::bitflags! {
    /// Flags of `KVM_CREATE_GUEST_MEMFD`.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct GmemFlags: u64 {
        /// The file can be mapped.
        const MMAP = 1 << 0;
        /// Content is the host's to use until a page is given to the guest.
        const INIT_SHARED = 1 << 1;
    }
}

/// One page of content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Page {
    /// Where it is.
    pub frame: Pfn,
    /// Holders that no unmapping gets rid of. An unshare waits for them.
    pub pins: u32,
    /// A guest has asked for it back: the gate admits nobody until that is settled.
    pub draining: bool,
}

/// The pages of one guest_memfd.
#[derive(Debug)]
pub struct Inode {
    number: u64,
    size: u64,
    flags: GmemFlags,
    content: RefCell<BTreeMap<u64, Page>>,
}

impl Inode {
    /// Makes one without pages. `size` is in bytes.
    ///
    /// EINVAL for an unknown flag, and for a size that is not positive (as a signed number) or unaligned,
    /// in Linux's order (`kvm_gmem_create`).
    pub fn new(host: &mut Host, size: u64, flags: u64) -> Result<Self, Errno> {
        let flags = GmemFlags::from_bits(flags).ok_or(Errno::EINVAL)?;
        if size == 0 || i64::try_from(size).is_err() || !is_aligned(size) {
            return Err(Errno::EINVAL);
        }
        Ok(Self { number: host.new_number(), size, flags, content: RefCell::default() })
    }

    /// Its inode number.
    pub fn number(&self) -> u64 {
        self.number
    }

    /// Its size in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Its size in pages.
    pub fn pages(&self) -> u64 {
        self.size / PAGE
    }

    /// Its flags.
    pub fn flags(&self) -> GmemFlags {
        self.flags
    }

    /// The page at an index, if there is one.
    pub fn page(&self, index: u64) -> Option<Page> {
        self.content.borrow().get(&index).copied()
    }

    /// The page at an index; a page of zeros is made if there is none. `None` beyond the end.
    pub fn page_or_new(&self, host: &mut Host, index: u64) -> Result<Option<Page>, Errno> {
        if index >= self.pages() {
            return Ok(None);
        }
        if let Some(page) = self.page(index) {
            return Ok(Some(page));
        }
        let frame = host.take_zeroed(Holder::Content)?;
        let page = Page { frame, pins: 0, draining: false };
        self.content.borrow_mut().insert(index, page);
        Ok(Some(page))
    }

    /// Marks the pages of a range as draining, or no more. Pages that do not exist are skipped.
    pub fn set_draining(&self, range: Range<u64>, draining: bool) {
        for page in self.content.borrow_mut().range_mut(range).map(|(_, page)| page) {
            page.draining = draining;
        }
    }

    /// Counts one more pin of a page that exists.
    pub(super) fn add_pin(&self, index: u64) -> Result<(), Errno> {
        let mut content = self.content.borrow_mut();
        let page = content.get_mut(&index).ok_or(Errno::ENOENT)?;
        page.pins = page.pins.checked_add(1).ok_or(Errno::EBUSY)?;
        Ok(())
    }

    /// Counts one pin less.
    pub(super) fn drop_pin(&self, index: u64) {
        if let Some(page) = self.content.borrow_mut().get_mut(&index) {
            page.pins = page.pins.saturating_sub(1);
        }
    }

    /// Whether a page of the range is pinned.
    pub fn is_pinned(&self, range: Range<u64>) -> bool {
        self.content.borrow().range(range).any(|(_, page)| page.pins > 0)
    }

    /// The pages that exist in a range, with their indices.
    pub fn existing(&self, range: Range<u64>) -> alloc::vec::Vec<(u64, Page)> {
        if range.start >= range.end {
            return alloc::vec::Vec::new();
        }
        self.content.borrow().range(range).map(|(index, page)| (*index, *page)).collect()
    }

    /// Takes a page out of the content. The caller frees its frame.
    pub fn remove(&self, index: u64) -> Option<Page> {
        self.content.borrow_mut().remove(&index)
    }

    /// Ends the inode. Pages that a protected VM owns stay the VM's, whose teardown frees them; the others are
    /// freed, after those that are lent were taken back.
    pub fn destroy(self, host: &mut Host) {
        for page in self.content.into_inner().into_values() {
            match host.frames.holder(page.frame) {
                Some(Holder::Lent { vm, gfn }) => {
                    match host.call(HostCall::UnshareGuest { vm, gfn: gfn.into(), pages: 1 }) {
                        Ok(_) => host.frames.taken_back(page.frame),
                        Err(error) => log::error!("{:?} lent to {vm:?}: {error:?}", page.frame),
                    }
                }
                Some(holder) if holder.is_given_away() => (),
                _ => host.give_back(page.frame),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::FakeMachine;

    #[test]
    fn sizes_and_flags_are_checked_as_linux_does() {
        let machine = FakeMachine::new(8);
        let mut host = machine.host();
        let mut new = |size, flags| Inode::new(&mut host, size, flags).map(|inode| inode.pages());
        for flags in 0..4 {
            assert_eq!(new(PAGE, flags), Ok(1));
        }
        for bit in 2..64 {
            assert_eq!(new(PAGE, 1 << bit), Err(Errno::EINVAL));
        }
        for size in [0, 1, 4097, 1 << 63, 4096u64.wrapping_neg()] {
            assert_eq!(new(size, 0), Err(Errno::EINVAL), "{size:#x}");
        }
        assert_eq!(new(1 << 62, 0), Ok(1 << 50));
        assert_eq!(new(0x7fff_ffff_ffff_f000, 0), Ok(0x7_ffff_ffff_ffff));
    }

    #[test]
    fn creation_takes_no_page_and_destruction_returns_all() {
        let machine = FakeMachine::new(8);
        let mut host = machine.host();
        let inode = Inode::new(&mut host, 4 * PAGE, 3).unwrap();
        assert_eq!(host.frames.free(), 8);
        inode.page_or_new(&mut host, 0).unwrap().unwrap();
        inode.page_or_new(&mut host, 3).unwrap().unwrap();
        assert_eq!(inode.page_or_new(&mut host, 4), Ok(None));
        assert_eq!(host.frames.free(), 6);
        inode.destroy(&mut host);
        assert_eq!(host.frames.free(), 8);
    }
}
