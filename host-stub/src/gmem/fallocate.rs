//! `fallocate` on a guest_memfd: populate a range, or punch a hole.
//!
//! The order of checks is that of Linux's `vfs_fallocate` and `kvm_gmem_fallocate`.

use alloc::rc::Rc;
use core::ops::Range;

use abi::{HostCall, HostState};

use super::Inode;
use crate::errno::Errno;
use crate::host::Host;
use crate::mm::{Holder, PAGE, is_aligned, page_up};

/// Something that may map content for programs: all processes, or a stand-in for them.
pub trait MapsContent {
    /// Unmaps pages of content everywhere, with all TLB maintenance done when it returns.
    fn unmap_content(&mut self, host: &mut Host, inode: &Rc<Inode>, pages: &Range<u64>);
}

/// `FALLOC_FL_KEEP_SIZE`.
pub const KEEP_SIZE: u64 = 1;
/// `FALLOC_FL_PUNCH_HOLE`.
pub const PUNCH_HOLE: u64 = 2;

/// Populates or punches.
pub fn fallocate(
    host: &mut Host,
    maps: &mut dyn MapsContent,
    inode: &Rc<Inode>,
    mode: u64,
    offset: u64,
    length: u64,
) -> Result<(), Errno> {
    let (Ok(signed_offset), Ok(signed_length)) = (i64::try_from(offset), i64::try_from(length)) else {
        return Err(Errno::EINVAL);
    };
    if signed_length == 0 {
        return Err(Errno::EINVAL);
    }
    let punch = match mode {
        KEEP_SIZE => false,
        mode if mode == KEEP_SIZE | PUNCH_HOLE => true,
        _ => return Err(Errno::EOPNOTSUPP),
    };
    let end = signed_offset.checked_add(signed_length).ok_or(Errno::EFBIG)? as u64;
    if !is_aligned(offset) || !is_aligned(length) {
        return Err(Errno::EINVAL);
    }
    let pages = offset / PAGE..page_up(end).ok_or(Errno::EFBIG)? / PAGE;
    if punch {
        return punch_hole(host, maps, inode, pages);
    }
    if end > inode.size() {
        return Err(Errno::EINVAL);
    }
    for index in pages {
        inode.page_or_new(host, index)?;
    }
    Ok(())
}

/// Drops the pages of a range, private or not. EBUSY, with nothing dropped, where a protected VM owns a page or
/// a page is pinned. At and beyond the end it succeeds without effect.
fn punch_hole(
    host: &mut Host,
    maps: &mut dyn MapsContent,
    inode: &Rc<Inode>,
    pages: Range<u64>,
) -> Result<(), Errno> {
    let existing = inode.existing(pages.clone());
    if inode.is_pinned(pages.clone()) {
        return Err(Errno::EBUSY);
    }
    for (_, page) in &existing {
        if let Some(Holder::Guest { .. }) = host.frames.holder(page.frame)
            && !is_the_hosts_again(host, page.frame.0)
        {
            return Err(Errno::EBUSY);
        }
    }
    maps.unmap_content(host, inode, &pages);
    for (index, page) in existing {
        if let Some(Holder::Lent { vm, gfn }) = host.frames.holder(page.frame) {
            host.call(HostCall::UnshareGuest { vm, gfn: gfn.into(), pages: 1 })?;
        }
        inode.remove(index);
        host.frames.taken_back(page.frame);
    }
    Ok(())
}

/// Whether a page that was given to a guest has come back without a word: the guest relinquished it.
fn is_the_hosts_again(host: &Host, pfn: u64) -> bool {
    let state = host.call(HostCall::QueryPage { pfn }).ok().and_then(|result| result.host_state());
    state == Some(HostState::Owned)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gmem::gate::{Intent, admit};
    use crate::testing::{FakeMachine, Unmappings};
    use abi::VmHandle;

    fn inode(host: &mut Host) -> Rc<Inode> {
        Rc::new(Inode::new(host, 4 * PAGE, 3).unwrap())
    }

    #[test]
    fn modes_and_ranges_fail_in_linuxs_order() {
        let machine = FakeMachine::new(8);
        let mut host = machine.host();
        let inode = inode(&mut host);
        let mut call = |mode, offset, length| {
            fallocate(&mut host, &mut Unmappings::default(), &inode, mode, offset, length)
        };
        for mode in [0, 2, 1 | 0x10, 1 | 8, 0x20, 1 | 0x40, 0x81, 1 << 31] {
            assert_eq!(call(mode, 0, PAGE), Err(Errno::EOPNOTSUPP), "{mode:#x}");
            assert_eq!(call(mode, 0, 0), Err(Errno::EINVAL));
        }
        assert_eq!(call(3, u64::MAX, PAGE), Err(Errno::EINVAL));
        assert_eq!(call(3, i64::MAX as u64 & !0xfff, PAGE), Err(Errno::EFBIG));
        for (offset, length) in [(0, 1), (0, PAGE - 1), (1, PAGE), (PAGE, PAGE + 1)] {
            assert_eq!(call(3, offset, length), Err(Errno::EINVAL));
        }
        assert_eq!(call(1, 4 * PAGE, PAGE), Err(Errno::EINVAL));
        assert_eq!(call(3, 4 * PAGE, PAGE), Ok(()));
        assert_eq!(call(3, 9 * PAGE, PAGE), Ok(()));
        assert_eq!(call(1, 0, 4 * PAGE), Ok(()));
    }

    #[test]
    fn a_hole_unmaps_and_frees_and_reads_as_zeros_after() {
        let machine = FakeMachine::new(8);
        let mut host = machine.host();
        let inode = inode(&mut host);
        let frame = admit(&mut host, &inode, 1, Intent::Fault).unwrap();
        host.machine.write(frame.address(), &[0xaa; 16]).ok().unwrap();
        let mut maps = Unmappings::default();
        fallocate(&mut host, &mut maps, &inode, 3, PAGE, PAGE).unwrap();
        assert_eq!(maps.ranges.first(), Some(&(1..2)));
        assert_eq!(maps.ranges.len(), 1);
        assert_eq!(host.frames.free(), 8);
        let frame = admit(&mut host, &inode, 1, Intent::Fault).unwrap();
        let mut bytes = [1; 16];
        host.machine.read(frame.address(), &mut bytes).ok().unwrap();
        assert_eq!(bytes, [0; 16]);
    }

    #[test]
    fn a_hole_where_a_protected_vm_owns_a_page_is_busy_and_drops_nothing() {
        let machine = FakeMachine::new(8);
        let mut host = machine.host();
        let inode = inode(&mut host);
        let own = inode.page_or_new(&mut host, 0).unwrap().unwrap().frame;
        let given = inode.page_or_new(&mut host, 1).unwrap().unwrap().frame;
        host.frames.note(given, Holder::Guest { vm: VmHandle::new(0, 1).unwrap(), gfn: 1 });
        machine.set_state(given, HostState::NoPage);
        let mut maps = Unmappings::default();
        let punch = fallocate(&mut host, &mut maps, &inode, 3, 0, 4 * PAGE);
        assert_eq!(punch, Err(Errno::EBUSY));
        assert!(maps.ranges.is_empty());
        assert_eq!(inode.page(0).map(|page| page.frame), Some(own));
        machine.set_state(given, HostState::Owned);
        assert_eq!(fallocate(&mut host, &mut maps, &inode, 3, 0, 4 * PAGE), Ok(()));
    }

    #[test]
    fn a_hole_over_a_pinned_page_is_busy_and_drops_nothing() {
        let machine = FakeMachine::new(8);
        let mut host = machine.host();
        let inode = inode(&mut host);
        let frames = [0, 1].map(|index| inode.page_or_new(&mut host, index).unwrap().unwrap().frame);
        admit(&mut host, &inode, 1, Intent::Pin).unwrap();
        let mut maps = Unmappings::default();
        assert_eq!(fallocate(&mut host, &mut maps, &inode, 3, 0, 4 * PAGE), Err(Errno::EBUSY));
        assert!(maps.ranges.is_empty());
        assert_eq!([0, 1].map(|index| inode.page(index).unwrap().frame), frames);
        assert_eq!(
            fallocate(&mut host, &mut maps, &inode, 3, 0, PAGE),
            Ok(()),
            "its neighbour is free to go"
        );
        crate::gmem::gate::unpin(&inode, 1);
        assert_eq!(fallocate(&mut host, &mut maps, &inode, 3, 0, 4 * PAGE), Ok(()));
    }
}
