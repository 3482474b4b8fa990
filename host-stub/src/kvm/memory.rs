//! A guest's memory: gives a page when the guest first touches it, and takes lent pages back.

use alloc::rc::Rc;
use alloc::vec::Vec;

use abi::page::Permissions;
use abi::{HostCall, HostState};

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
    /// Whether the program has no thread but the one that calls.
    fn is_single_threaded(&self) -> bool;
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
    let number = u32::try_from(gfn).map_err(|_| Missing::Error(Errno::EIO))?;
    caller.unmap_content(host, inode, &(index..index.saturating_add(1)));
    match vm.call(host, HostCall::DonateGuest { vm: vm.handle(), pfn: frame.0, gfn, pages: 1 }) {
        Ok(_) => (),
        Err(_) if has_page(host, vm, frame, gfn) => return Ok(()),
        Err(error) => return Err(error.into()),
    }
    host.frames.note(frame, Holder::Guest { vm: vm.handle(), gfn: number });
    vm.given.borrow_mut().guest.insert(gfn, frame);
    Ok(())
}

/// Whether a VM has got a page meanwhile: two vCPUs can miss it at the same time, and the second one comes here when the
/// first has been served.
fn has_page(host: &Host, vm: &Vm, frame: Pfn, gfn: u64) -> bool {
    vm.given.borrow().guest.get(&gfn) == Some(&frame)
        && host
            .call(HostCall::QueryPage { pfn: frame.0 })
            .is_ok_and(|result| result.values[0] != HostState::Owned as u64)
}

/// Lends a page. The books have room for one borrower of a page: a page that two slots show is EBUSY.
fn lend(host: &mut Host, vm: &Vm, frame: Pfn, gfn: u64, slot: &Slot) -> Result<(), Missing> {
    let number = u32::try_from(gfn).map_err(|_| Missing::Error(Errno::EIO))?;
    let lent = Holder::Lent { vm: vm.handle(), gfn: number };
    if host.frames.holder(frame).is_some_and(|holder| holder.is_given_away() && holder != lent) {
        return Err(Missing::Error(Errno::EBUSY));
    }
    let permissions = Permissions { write: slot.flags & READONLY == 0, execute: true };
    match vm.call(host, HostCall::ShareGuest { vm: vm.handle(), pfn: frame.0, gfn, pages: 1, permissions }) {
        Ok(_) => (),
        // Of a page that may only be read, it may be a store that the guest has tried.
        Err(_) if permissions.write && has_page(host, vm, frame, gfn) => return Ok(()),
        Err(error) => return Err(error.into()),
    }
    host.frames.note(frame, lent);
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
            // Its file took it back when it ended.
            Err(Errno::ENOENT) => (),
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gmem::fallocate::fallocate;
    use crate::gmem::gate::{self, Intent};
    use crate::kvm::slots::{Descriptor, RegionRequest, set_region};
    use crate::mm::{Backing, Prot};
    use crate::testing::{Event, FakeMachine, World};
    use abi::HostState;

    #[test]
    fn two_vcpus_that_miss_one_page_both_go_on() {
        for machine_type in [crate::kvm::vm::TYPE_PROTECTED, 0] {
            let machine = FakeMachine::new(64);
            let mut world = World::of_type(&machine, 2, machine_type);
            let mut give = |page: u64| {
                give_page(&mut world.host, &mut world.caller, &world.vm, World::IPA + page * PAGE)
            };
            assert_eq!(give(0), Ok(()));
            machine.refuse_gifts(true);
            assert_eq!(give(0), Ok(()), "EL2 refuses to give it twice");
            assert_eq!(give(1), Err(Missing::Error(Errno::EPERM)));
        }
    }

    /// An unprotected VM that uses 4 pages of its program's anonymous memory, shown twice.
    fn plain(machine: &FakeMachine) -> World<'_> {
        let mut world = World::of_type(machine, 2, 0);
        world.caller.space.map(AT..AT + 4 * PAGE, Prot::READ | Prot::WRITE, Backing::Anonymous).unwrap();
        for (slot, guest_phys_addr) in [(5, GPA), (6, GPA + 16 * PAGE)] {
            let request = RegionRequest {
                slot,
                guest_phys_addr,
                memory_size: 4 * PAGE,
                userspace_addr: AT,
                ..RegionRequest::default()
            };
            set_region(&world.vm, &request, false, &|_| Descriptor::Closed).unwrap();
        }
        world
    }

    const AT: u64 = 0x40_0000;
    const GPA: u64 = 0x1000_0000;

    #[test]
    fn unmapping_memory_that_a_vm_uses_takes_it_back_before_it_is_freed() {
        let machine = FakeMachine::new(64);
        let mut world = plain(&machine);
        let World { host, caller, vm, .. } = &mut world;
        give_page(host, caller, vm, GPA + PAGE).unwrap();
        machine.events();
        let unmapped = caller.space.unmap(host, &(AT..AT + 4 * PAGE));
        let [frame] = unmapped.lent[..] else { panic!("one page was lent") };
        assert!(matches!(host.frames.holder(frame), Some(Holder::Lent { .. })));
        crate::kernel::release_unmapped(host, alloc::vec![vm.clone()], unmapped);
        assert_eq!(machine.events().last(), Some(&Event::Unshare { gfn: GPA / PAGE + 1 }));
        assert_eq!(host.frames.holder(frame), Some(Holder::Free));
        assert_eq!(give_page(host, caller, vm, GPA), Err(Missing::Error(Errno::EFAULT)));
    }

    #[test]
    fn memory_outlives_the_vm_that_used_it() {
        let machine = FakeMachine::new(64);
        let mut world = plain(&machine);
        let World { host, caller, vm, .. } = &mut world;
        give_page(host, caller, vm, GPA).unwrap();
        let frame = caller.frame_at(host, AT, Access::Read).unwrap();
        let World { mut host, vm, view, vcpu, caller } = world;
        let vm_given = vm.clone();
        drop((vm, vcpu));
        let mut space = caller.space;
        let content = space.unmap(&mut host, &(World::VA..World::VA + 2 * PAGE));
        crate::kernel::release_unmapped(&mut host, Vec::new(), content);
        crate::kernel::release_file(&mut host, Rc::new(crate::fs::File::Gmem(view.unwrap())));
        crate::kernel::release_vm(&mut host, vm_given);
        assert_eq!(host.frames.holder(frame), Some(Holder::Program));
        assert_eq!(space.resolve(&mut host, AT, Access::Read), Ok(frame));
        assert!(space.destroy(&mut host).lent.is_empty());
        assert_eq!(host.frames.free(), 64);
    }

    #[test]
    fn a_page_has_one_borrower() {
        let machine = FakeMachine::new(64);
        let mut world = plain(&machine);
        let World { host, caller, vm, .. } = &mut world;
        give_page(host, caller, vm, GPA).unwrap();
        let again = give_page(host, caller, vm, GPA + 16 * PAGE);
        assert_eq!(again, Err(Missing::Error(Errno::EBUSY)));
    }

    #[test]
    fn a_page_punched_after_the_guest_relinquished_it_is_no_longer_the_vms() {
        let machine = FakeMachine::new(64);
        let mut world = World::new(&machine, 4);
        world.give_all_pages();
        let frame = world.frame(0);
        machine.set_state(frame, HostState::Owned);
        let inode = world.inode().clone();
        fallocate(&mut world.host, &mut world.caller, &inode, 3, 0, PAGE).unwrap();
        drop(inode);
        assert_eq!(world.host.take_zeroed(Holder::Kernel), Ok(frame));
        let host = world.close_everything();
        assert_eq!(host.frames.holder(frame), Some(Holder::Kernel));
        assert_eq!(host.frames.census().lost, 0);
    }

    #[test]
    fn a_page_that_cannot_be_given_stays_the_hosts_and_can_be_given_later() {
        for machine_type in [crate::kvm::vm::TYPE_PROTECTED, 0] {
            let machine = FakeMachine::new(64);
            let mut world = World::of_type(&machine, 4, machine_type);
            let frame = world.touch(1).unwrap();
            let ipa = World::IPA + PAGE;
            machine.refuse_gifts(true);
            for _ in 0..3 {
                let given = give_page(&mut world.host, &mut world.caller, &world.vm, ipa);
                assert_eq!(given, Err(Missing::Error(Errno::EPERM)));
                assert_eq!(world.host.frames.holder(frame), Some(Holder::Content));
                assert!(world.vm.given.borrow().guest.is_empty());
                assert_eq!(world.touch(1), Ok(frame), "the program has it as before");
            }
            machine.refuse_gifts(false);
            give_page(&mut world.host, &mut world.caller, &world.vm, ipa).unwrap();
            assert!(world.host.frames.holder(frame).is_some_and(Holder::is_given_away));
        }
    }

    #[test]
    fn a_pinned_page_is_not_given_to_a_guest() {
        let machine = FakeMachine::new(64);
        let mut world = World::new(&machine, 4);
        let inode = world.inode().clone();
        let frame = gate::admit(&mut world.host, &inode, 2, Intent::Pin).unwrap();
        let ipa = World::IPA + 2 * PAGE;
        machine.events();
        let given = give_page(&mut world.host, &mut world.caller, &world.vm, ipa);
        assert_eq!(given, Err(Missing::Error(Errno::EBUSY)));
        assert_eq!((machine.events(), machine.host_state(frame)), (Vec::new(), HostState::Owned));
        gate::unpin(&inode, 2);
        give_page(&mut world.host, &mut world.caller, &world.vm, ipa).unwrap();
        assert_eq!(machine.host_state(frame), HostState::NoPage);
    }

    #[test]
    fn private_content_is_not_lent_to_another_vm_by_the_address_of_its_mapping() {
        let machine = FakeMachine::new(64);
        let mut world = World::new(&machine, 4);
        give_page(&mut world.host, &mut world.caller, &world.vm, World::IPA).unwrap();
        let other = Rc::new(Vm::new(&mut world.host, 0).unwrap());
        let request = RegionRequest {
            slot: 3,
            guest_phys_addr: GPA,
            memory_size: 4 * PAGE,
            userspace_addr: World::VA,
            ..RegionRequest::default()
        };
        set_region(&other, &request, false, &|_| Descriptor::Closed).unwrap();
        machine.events();
        let mut lend = |page| give_page(&mut world.host, &mut world.caller, &other, GPA + page * PAGE);
        assert_eq!(lend(0), Err(Missing::Error(Errno::EFAULT)));
        assert!(machine.events().is_empty(), "EL2 is not even asked for it");
        assert_eq!(lend(1), Ok(()), "content that is the host's own is memory like any other");
    }
}
