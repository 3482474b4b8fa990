//! A guest's memory: gives a page when the guest first touches it, and takes lent pages back.

use alloc::rc::Rc;
use alloc::vec::Vec;

use abi::HostCall;
use abi::page::Permissions;

use super::slots::{READONLY, Slot, Source};
use super::vm::Vm;
use crate::errno::Errno;
use crate::gmem::fallocate::MapsContent;
use crate::gmem::{Inode, View};
use crate::host::Host;
use crate::mm::space::Access;
use crate::mm::{Holder, PAGE, Pfn};

/// A caller's memory: what maps content, and how an address of the caller becomes a frame.
pub trait Caller: MapsContent {
    /// Finds the frame behind an address of the calling program, faulting it in.
    fn frame_at(&mut self, host: &mut Host, address: u64, access: Access) -> Result<Pfn, Errno>;
}

/// Why a guest's page could not be given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Missing {
    /// No slot is there.
    NoSlot,
    /// The slot's guest_memfd is closed.
    Closed,
    /// Something failed.
    Error(Errno),
}

impl From<Errno> for Missing {
    fn from(error: Errno) -> Self {
        Self::Error(error)
    }
}

/// Gives the page at an IPA to the guest: donates it to a protected VM, lends it to another.
pub fn give_page(host: &mut Host, caller: &mut dyn Caller, vm: &Rc<Vm>, ipa: u64) -> Result<(), Missing> {
    let gfn = ipa / PAGE;
    let (slot, place) = {
        let slots = vm.slots.borrow();
        let (slot, place) = slots.find(gfn).ok_or(Missing::NoSlot)?;
        (slot.clone(), place)
    };
    match &slot.source {
        Source::Gmem { view, first } => {
            let view = view.upgrade().ok_or(Missing::Closed)?;
            let index = first.saturating_add(place);
            let page = view.inode().page_or_new(host, index)?.ok_or(Missing::Closed)?;
            if page.pins > 0 {
                return Err(Missing::Error(Errno::EBUSY));
            }
            if vm.is_protected() {
                donate(host, caller, vm, view.inode(), index, page.frame, gfn)
            } else {
                lend(host, vm, page.frame, gfn, &slot)
            }
        }
        Source::Program { address } => {
            let address = address.saturating_add(place.saturating_mul(PAGE));
            let access = if slot.flags & READONLY != 0 { Access::Read } else { Access::Write };
            let frame = caller.frame_at(host, address, access).map_err(|_| Missing::Error(Errno::EFAULT))?;
            lend(host, vm, frame, gfn, &slot)
        }
    }
}

/// Unmaps a page everywhere, then donates it. The order matters to the host alone: a mapping that stayed
/// would be dead, and kill who uses it.
fn donate(
    host: &mut Host,
    caller: &mut dyn Caller,
    vm: &Vm,
    inode: &Rc<Inode>,
    index: u64,
    frame: Pfn,
    gfn: u64,
) -> Result<(), Missing> {
    caller.unmap_content(host, inode, &(index..index.saturating_add(1)));
    vm.call(host, HostCall::DonateGuest { vm: vm.handle(), pfn: frame.0, gfn, pages: 1 })?;
    let number = u32::try_from(gfn).map_err(|_| Missing::Error(Errno::EIO))?;
    host.frames.note(frame, Holder::Guest { vm: vm.handle(), gfn: number });
    vm.given.borrow_mut().guest.insert(gfn, frame);
    Ok(())
}

fn lend(host: &mut Host, vm: &Vm, frame: Pfn, gfn: u64, slot: &Slot) -> Result<(), Missing> {
    let permissions = Permissions { write: slot.flags & READONLY == 0, execute: true };
    vm.call(host, HostCall::ShareGuest { vm: vm.handle(), pfn: frame.0, gfn, pages: 1, permissions })?;
    let number = u32::try_from(gfn).map_err(|_| Missing::Error(Errno::EIO))?;
    host.frames.note(frame, Holder::Lent { vm: vm.handle(), gfn: number });
    vm.given.borrow_mut().guest.insert(gfn, frame);
    Ok(())
}

/// Takes lent pages back from a VM that is not protected: those in a range of guest frames. What becomes of
/// the frames is the caller's to say.
pub fn take_lent_back(host: &mut Host, vm: &Vm, frames: core::ops::Range<u64>) -> Vec<Pfn> {
    let lent: Vec<(u64, Pfn)> =
        vm.given.borrow().guest.range(frames).map(|(gfn, frame)| (*gfn, *frame)).collect();
    let mut back = Vec::new();
    for (gfn, frame) in lent {
        match host.call(HostCall::UnshareGuest { vm: vm.handle(), gfn, pages: 1 }) {
            Ok(_) => back.push(frame),
            Err(error) => log::error!("{frame:?} lent to {:?} did not come back: {error:?}", vm.handle()),
        }
        vm.given.borrow_mut().guest.remove(&gfn);
    }
    back
}

/// The slots of a view's VM that see these pages lose them, where they are only lent: before a page leaves
/// the inode, and when the view ends.
pub fn withdraw(host: &mut Host, view: &View, pages: &core::ops::Range<u64>) {
    if view.vm().is_protected() {
        return;
    }
    let numbers = view.bound_slots(pages);
    for number in numbers {
        let Some(slot) = view.vm().slots.borrow().get(number).cloned() else { continue };
        let Source::Gmem { first, .. } = slot.source else { continue };
        let count = slot.frames.end.saturating_sub(slot.frames.start);
        let start = pages.start.max(first).saturating_sub(first);
        let end = pages.end.min(first.saturating_add(count)).saturating_sub(first);
        let range = slot.frames.start.saturating_add(start)..slot.frames.start.saturating_add(end);
        if range.start < range.end {
            for frame in take_lent_back(host, view.vm(), range) {
                host.frames.note(frame, Holder::Content);
            }
        }
    }
}
