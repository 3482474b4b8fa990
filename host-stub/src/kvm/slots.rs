//! Memory slots: `KVM_SET_USER_MEMORY_REGION` and its second form.
//!
//! The checks stand in Linux's order (`kvm_set_memory_region`, `kvm_gmem_bind`), numbered M1 to M19: a request
//! with several faults gets the error of the first. M18 is about MTE, which no VM here has.
//!
//! The programs have their own copy of the structure and its flags (`host-stub/programs/src/uapi.rs`): these
//! are the two sides of an interface.

use alloc::collections::BTreeMap;
use alloc::rc::{Rc, Weak};
use core::ops::Range;

use super::vm::{IPA_BITS, Vm};
use crate::errno::Errno;
use crate::gmem::{GmemFlags, View};
use crate::mm::{PAGE, is_aligned, space::USER};

/// Slots of a VM.
pub const SLOTS: u16 = 32;
/// `KVM_MEM_LOG_DIRTY_PAGES`.
pub const LOG_DIRTY_PAGES: u32 = 1 << 0;
/// `KVM_MEM_READONLY`.
pub const READONLY: u32 = 1 << 1;
/// `KVM_MEM_GUEST_MEMFD`.
pub const GUEST_MEMFD: u32 = 1 << 2;
const MAX_PAGES: u64 = (1 << 31) - 1;

/// `struct kvm_userspace_memory_region2`, as far as it has meaning.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RegionRequest {
    /// Slot, and address space in the upper half.
    pub slot: u32,
    /// `KVM_MEM_*`.
    pub flags: u32,
    /// IPA of its first byte.
    pub guest_phys_addr: u64,
    /// Bytes; 0 deletes the slot.
    pub memory_size: u64,
    /// Where the program sees it; may be 0 for a guest_memfd.
    pub userspace_addr: u64,
    /// Byte offset in the guest_memfd.
    pub guest_memfd_offset: u64,
    /// Descriptor of the guest_memfd.
    pub guest_memfd: u32,
}

/// What a request's descriptor leads to.
#[derive(Clone, Debug)]
pub enum Descriptor {
    /// Nothing is open there.
    Closed,
    /// Something that is no guest_memfd.
    Other,
    /// A guest_memfd.
    Gmem(Rc<View>),
}

/// What a slot's pages come from.
#[derive(Clone, Debug)]
pub enum Source {
    /// A guest_memfd, which the slot does not keep alive.
    Gmem {
        /// The view; gone once its last file and mapping are closed.
        view: Weak<View>,
        /// First page of the inode.
        first: u64,
    },
    /// Memory of the program.
    Program {
        /// Its address there.
        address: u64,
    },
}

/// A memory slot.
#[derive(Clone, Debug)]
pub struct Slot {
    /// Guest frame numbers.
    pub frames: Range<u64>,
    /// Flags that it was made with.
    pub flags: u32,
    /// Where its pages come from.
    pub source: Source,
}

/// What a request did.
#[derive(Debug)]
pub enum Change {
    /// A slot is there now that was not, or with other flags.
    Set,
    /// A slot is gone; the guest must lose its pages where they are the host's.
    Deleted(Slot),
}

/// The slots of one VM.
#[derive(Debug, Default)]
pub struct Slots {
    slots: BTreeMap<u16, Slot>,
}

impl Slots {
    /// The slot that holds a guest frame, with the frame's place in it.
    pub fn find(&self, gfn: u64) -> Option<(&Slot, u64)> {
        let slot = self.slots.values().find(|slot| slot.frames.contains(&gfn))?;
        Some((slot, gfn.checked_sub(slot.frames.start)?))
    }

    /// The slots that share a frame with the range.
    pub fn overlapping(&self, frames: &Range<u64>) -> impl Iterator<Item = &Slot> {
        let (start, end) = (frames.start, frames.end);
        self.slots.values().filter(move |slot| slot.frames.start < end && start < slot.frames.end)
    }

    /// A slot by its number.
    pub fn get(&self, number: u16) -> Option<&Slot> {
        self.slots.get(&number)
    }
}

/// Sets, changes or deletes a slot of a VM. `second_form` tells the two ioctls apart; `descriptor` looks up
/// a descriptor of the caller, and is asked only when Linux would.
pub fn set_region(
    vm: &Rc<Vm>,
    request: &RegionRequest,
    second_form: bool,
    descriptor: &dyn Fn(u32) -> Descriptor,
) -> Result<Change, Errno> {
    let flags = request.flags;
    // M1
    if !second_form && flags & !(LOG_DIRTY_PAGES | READONLY) != 0 {
        return Err(Errno::EINVAL);
    }
    // M2
    let number = (request.slot & 0xffff) as u16;
    if number >= SLOTS {
        return Err(Errno::EINVAL);
    }
    let gmem = flags & GUEST_MEMFD != 0;
    check_flags(vm, flags)?;
    check_ranges(request, gmem)?;
    let mut slots = vm.slots.borrow_mut();
    let existing = slots.slots.get(&number);
    // M7
    if request.memory_size == 0 {
        if existing.is_none() {
            return Err(Errno::EINVAL);
        }
        return delete(vm, &mut slots, number);
    }
    let first = request.guest_phys_addr / PAGE;
    let frames = first..first.saturating_add(request.memory_size / PAGE);
    if let Some(slot) = existing {
        return change(slot, &frames, request).map(|()| Change::Set);
    }
    // M10
    let overlaps = |slot: &Slot| slot.frames.start < frames.end && frames.start < slot.frames.end;
    if slots.slots.values().any(overlaps) {
        return Err(Errno::EEXIST);
    }
    if !gmem {
        check_end(&frames)?;
        // A protected VM's memory is a guest_memfd, and nothing else.
        if vm.is_protected() {
            return Err(Errno::EINVAL);
        }
        let source = Source::Program { address: request.userspace_addr };
        slots.slots.insert(number, Slot { frames, flags, source });
        return Ok(Change::Set);
    }
    let view = match descriptor(request.guest_memfd) {
        Descriptor::Closed => return Err(Errno::EBADF), // M11
        Descriptor::Other => return Err(Errno::EINVAL), // M12
        Descriptor::Gmem(view) => view,
    };
    // M13
    if !Rc::ptr_eq(view.vm(), vm) {
        return Err(Errno::EINVAL);
    }
    // M14; the sum was checked for wrapping
    let end = request.guest_memfd_offset.saturating_add(request.memory_size);
    if end > view.inode().size() {
        return Err(Errno::EINVAL);
    }
    // M15
    let page = request.guest_memfd_offset / PAGE;
    let binding = view.prepare(page..end / PAGE, number)?;
    check_end(&frames)?;
    // M17
    if !view.inode().flags().contains(GmemFlags::MMAP) {
        return Err(Errno::EINVAL);
    }
    binding.commit();
    let source = Source::Gmem { view: Rc::downgrade(&view), first: page };
    slots.slots.insert(number, Slot { frames, flags, source });
    Ok(Change::Set)
}

/// M3: combinations of flags. A protected VM has neither dirty logging nor read-only slots (M19).
fn check_flags(vm: &Vm, flags: u32) -> Result<(), Errno> {
    let gmem = flags & GUEST_MEMFD != 0;
    let unknown = flags & !(LOG_DIRTY_PAGES | READONLY | GUEST_MEMFD) != 0;
    if unknown || (gmem && flags & (LOG_DIRTY_PAGES | READONLY) != 0) {
        return Err(Errno::EINVAL);
    }
    if vm.is_protected() && flags & (LOG_DIRTY_PAGES | READONLY) != 0 {
        return Err(Errno::EPERM);
    }
    Ok(())
}

/// M4 to M6: alignment, wrapping, sizes.
fn check_ranges(request: &RegionRequest, gmem: bool) -> Result<(), Errno> {
    let size = request.memory_size;
    let aligned =
        is_aligned(size) && is_aligned(request.guest_phys_addr) && is_aligned(request.userspace_addr);
    let user_end = request.userspace_addr.checked_add(size).filter(|end| *end <= USER.end);
    if !aligned || user_end.is_none() {
        return Err(Errno::EINVAL);
    }
    if gmem {
        let end = request.guest_memfd_offset.checked_add(size);
        if !is_aligned(request.guest_memfd_offset) || end.is_none() {
            return Err(Errno::EINVAL);
        }
    }
    let end = request.guest_phys_addr.checked_add(size);
    if request.slot >> 16 != 0 || end.is_none() || size / PAGE > MAX_PAGES {
        return Err(Errno::EINVAL);
    }
    Ok(())
}

/// M16: the end of the IPA space.
fn check_end(frames: &Range<u64>) -> Result<(), Errno> {
    if frames.end > (1 << IPA_BITS) / PAGE { Err(Errno::EFAULT) } else { Ok(()) }
}

fn delete(vm: &Vm, slots: &mut Slots, number: u16) -> Result<Change, Errno> {
    // M19
    if vm.is_protected() && vm.started.get() {
        return Err(Errno::EPERM);
    }
    let slot = slots.slots.remove(&number).ok_or(Errno::EINVAL)?;
    if let Source::Gmem { view, first } = &slot.source
        && let Some(view) = view.upgrade()
    {
        view.unbind(*first);
    }
    Ok(Change::Deleted(slot))
}

/// M8 and M9: what may change of a slot that exists. Its pages stay; so does a guest_memfd's slot as a whole.
fn change(slot: &Slot, frames: &Range<u64>, request: &RegionRequest) -> Result<(), Errno> {
    let was_gmem = slot.flags & GUEST_MEMFD != 0;
    if was_gmem || request.flags & GUEST_MEMFD != 0 {
        return Err(Errno::EINVAL);
    }
    match slot.source {
        // Asking for what is there already is no change. A move or another address is refused.
        Source::Program { address }
            if address == request.userspace_addr && slot.frames == *frames && slot.flags == request.flags =>
        {
            Ok(())
        }
        _ => Err(Errno::EINVAL),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gmem::Inode;
    use crate::host::Host;
    use crate::kvm::vm::TYPE_PROTECTED;
    use crate::testing::FakeMachine;

    const GPA: u64 = 0x8000_0000;

    struct Fixture<'m> {
        host: Host<'m>,
        vm: Rc<Vm>,
        view: Rc<View>,
    }

    /// A VM and its guest_memfd of 8 pages.
    fn fixture(machine: &FakeMachine, machine_type: u64, flags: u64) -> Fixture<'_> {
        let mut host = machine.host();
        let vm = Rc::new(Vm::new(&mut host, machine_type).unwrap());
        let inode = Rc::new(Inode::new(&mut host, 8 * PAGE, flags).unwrap());
        let view = Rc::new(View::new(inode, vm.clone()));
        Fixture { host, vm, view }
    }

    fn request() -> RegionRequest {
        RegionRequest {
            slot: 1,
            flags: GUEST_MEMFD,
            guest_phys_addr: GPA,
            memory_size: 2 * PAGE,
            ..RegionRequest::default()
        }
    }

    impl Fixture<'_> {
        fn set(&self, request: RegionRequest) -> Result<(), Errno> {
            set_region(&self.vm, &request, true, &|_| Descriptor::Gmem(self.view.clone())).map(|_| ())
        }
    }

    #[test]
    fn each_check_comes_before_the_next_one() {
        let machine = FakeMachine::new(32);
        let Fixture { vm, view, mut host } = fixture(&machine, TYPE_PROTECTED, 2);
        let stranger = Rc::new(Vm::new(&mut host, TYPE_PROTECTED).unwrap());
        let foreign = Rc::new(View::new(view.inode().clone(), stranger));
        let occupied = Rc::new(View::new(Rc::new(Inode::new(&mut host, 8 * PAGE, 3).unwrap()), vm.clone()));
        let neighbour = RegionRequest { slot: 2, guest_phys_addr: GPA + 8 * PAGE, ..request() };
        set_region(&vm, &neighbour, true, &|_| Descriptor::Gmem(occupied.clone())).unwrap();

        // Everything is wrong at first; each step repairs one thing and meets the next check.
        let mut request = RegionRequest {
            slot: 1 << 16 | 99,
            flags: GUEST_MEMFD | READONLY | 1 << 7,
            guest_phys_addr: GPA + 7 * PAGE + 1,
            memory_size: 2 * PAGE,
            userspace_addr: 1,
            guest_memfd_offset: u64::MAX - 1,
            guest_memfd: 9,
        };
        let set = |request: &RegionRequest, second, descriptor: Descriptor| {
            set_region(&vm, request, second, &|_| descriptor.clone()).map(|_| ())
        };
        let closed = || Descriptor::Closed;
        assert_eq!(set(&request, false, closed()), Err(Errno::EINVAL)); // M1
        assert_eq!(set(&request, true, closed()), Err(Errno::EINVAL)); // M2
        request.slot = 1 << 16 | 1;
        assert_eq!(set(&request, true, closed()), Err(Errno::EINVAL)); // M3
        request.flags = GUEST_MEMFD;
        assert_eq!(set(&request, true, closed()), Err(Errno::EINVAL)); // M4
        request.guest_phys_addr -= 1;
        request.userspace_addr = 0;
        assert_eq!(set(&request, true, closed()), Err(Errno::EINVAL)); // M5
        request.guest_memfd_offset = 7 * PAGE;
        assert_eq!(set(&request, true, closed()), Err(Errno::EINVAL)); // M6
        request.slot = 1;
        assert_eq!(set(&request, true, closed()), Err(Errno::EEXIST)); // M10
        request.guest_phys_addr = (1 << IPA_BITS) - PAGE;
        assert_eq!(set(&request, true, closed()), Err(Errno::EBADF)); // M11
        assert_eq!(set(&request, true, Descriptor::Other), Err(Errno::EINVAL)); // M12
        assert_eq!(set(&request, true, Descriptor::Gmem(foreign)), Err(Errno::EINVAL)); // M13
        assert_eq!(set(&request, true, Descriptor::Gmem(view.clone())), Err(Errno::EINVAL)); // M14
        request.guest_memfd_offset = 0;
        assert_eq!(set(&request, true, Descriptor::Gmem(occupied)), Err(Errno::EEXIST)); // M15
        assert_eq!(set(&request, true, Descriptor::Gmem(view.clone())), Err(Errno::EFAULT)); // M16
        request.guest_phys_addr = GPA;
        assert_eq!(set(&request, true, Descriptor::Gmem(view.clone())), Err(Errno::EINVAL)); // M17
        assert!(view.bound_slots(&(0..8)).is_empty());
    }

    #[test]
    fn only_a_file_that_can_be_mapped_can_be_bound() {
        for (flags, expected) in [(0, Err(Errno::EINVAL)), (1, Ok(())), (2, Err(Errno::EINVAL)), (3, Ok(()))]
        {
            let machine = FakeMachine::new(32);
            assert_eq!(fixture(&machine, TYPE_PROTECTED, flags).set(request()), expected, "{flags}");
        }
    }

    #[test]
    fn a_bound_slot_can_only_be_deleted() {
        let machine = FakeMachine::new(32);
        let fixture = fixture(&machine, TYPE_PROTECTED, 3);
        fixture.set(request()).unwrap();
        assert_eq!(fixture.set(request()), Err(Errno::EINVAL));
        assert_eq!(fixture.set(RegionRequest { guest_phys_addr: 0, ..request() }), Err(Errno::EINVAL));
        assert_eq!(fixture.set(RegionRequest { memory_size: PAGE, ..request() }), Err(Errno::EINVAL));
        assert_eq!(fixture.set(RegionRequest { flags: 0, ..request() }), Err(Errno::EINVAL));
        // The descriptor of a deletion is not looked at.
        let delete = RegionRequest { memory_size: 0, ..request() };
        let result = set_region(&fixture.vm, &delete, true, &|_| Descriptor::Closed);
        assert!(matches!(result, Ok(Change::Deleted(_))));
        assert_eq!(fixture.set(delete), Err(Errno::EINVAL));
        fixture.set(request()).unwrap();
    }

    #[test]
    fn after_the_first_run_a_protected_vms_slots_stay() {
        let machine = FakeMachine::new(32);
        let fixture = fixture(&machine, TYPE_PROTECTED, 3);
        fixture.set(request()).unwrap();
        fixture.vm.started.set(true);
        assert_eq!(fixture.set(RegionRequest { memory_size: 0, ..request() }), Err(Errno::EPERM));
        let other = RegionRequest { slot: 3, guest_phys_addr: 0, guest_memfd_offset: 4 * PAGE, ..request() };
        assert_eq!(fixture.set(other), Ok(()));
    }

    #[test]
    fn disjoint_parts_of_one_file_go_to_two_slots_and_overlaps_to_none() {
        let machine = FakeMachine::new(32);
        let fixture = fixture(&machine, TYPE_PROTECTED, 3);
        let at = |slot, gpa_page: u64, file_page: u64| RegionRequest {
            slot,
            guest_phys_addr: GPA + gpa_page * PAGE,
            guest_memfd_offset: file_page * PAGE,
            ..request()
        };
        fixture.set(at(1, 0, 0)).unwrap();
        fixture.set(at(2, 2, 2)).unwrap();
        for bad in [at(3, 10, 1), at(3, 10, 3), at(3, 1, 5), at(3, 3, 5)] {
            assert_eq!(fixture.set(bad), Err(Errno::EEXIST));
        }
        let slots = fixture.vm.slots.borrow();
        let (slot, place) = slots.find(GPA / PAGE + 3).unwrap();
        assert!(matches!(slot.source, Source::Gmem { first: 2, .. }));
        assert_eq!(place, 1);
    }

    #[test]
    fn a_protected_vm_takes_no_other_memory_than_a_guest_memfd() {
        let machine = FakeMachine::new(32);
        let ordinary = RegionRequest { flags: 0, userspace_addr: 0x10_0000, ..request() };
        assert_eq!(fixture(&machine, TYPE_PROTECTED, 3).set(ordinary), Err(Errno::EINVAL));
        assert_eq!(fixture(&machine, 0, 3).set(ordinary), Ok(()));
        let read_only = RegionRequest { flags: READONLY, ..ordinary };
        assert_eq!(fixture(&machine, TYPE_PROTECTED, 3).set(read_only), Err(Errno::EPERM));
    }

    #[test]
    fn a_binding_does_not_keep_the_file_alive() {
        let machine = FakeMachine::new(32);
        let fixture = fixture(&machine, TYPE_PROTECTED, 3);
        fixture.set(request()).unwrap();
        assert_eq!(Rc::strong_count(&fixture.view), 1);
        assert_eq!(Rc::strong_count(&fixture.vm), 2);
    }

    #[test]
    fn an_offset_near_the_largest_number_is_beyond_the_file_and_binds_nothing() {
        let machine = FakeMachine::new(32);
        let fixture = fixture(&machine, TYPE_PROTECTED, 3);
        // Where the sum is negative as a signed number, where it is just not, and where it wraps.
        for offset in [i64::MAX as u64 & !(PAGE - 1), (1 << 63) - 8 * PAGE, 1 << 63, !(PAGE - 1)] {
            for memory_size in [PAGE, 8 * PAGE] {
                let request = RegionRequest { guest_memfd_offset: offset, memory_size, ..request() };
                assert_eq!(fixture.set(request), Err(Errno::EINVAL), "{offset:#x}");
            }
        }
        assert!(fixture.view.bound_slots(&(0..u64::MAX)).is_empty());
        fixture.set(request()).unwrap();
    }
}
