//! Virtual machines: the table of handles, what a VM is, and its life from creation to the end of teardown.
//!
//! | file | what it owns |
//! |---|---|
//! | [`context`] | a vCPU's registers, and why it stopped |
//! | [`vcpu`] | a vCPU's record |
//! | [`run`] | running a vCPU until its next exit |
//! | [`guest_call`] | the calls of a guest |
//! | [`power`] | a guest's PSCI |
//! | [`sysreg`] | trapped system registers |
//! | [`inject`] | exceptions that EL2 delivers to a guest |
//! | [`mmio`] | accesses to devices |
//!
//! A handle is a slot and the slot's generation, which never repeats (I9). The lock of a slot guards
//! everything about its VM, except the record of a vCPU that some CPU has claimed: that CPU owns it.
//! `Vms::creation` is taken before any other lock, and only to create a VM.

#![forbid(unsafe_code)]

pub mod context;
pub mod guest_call;
pub mod inject;
pub mod mmio;
pub mod power;
pub mod run;
pub mod sysreg;
pub mod vcpu;

use crate::addr::{Pages, Pfn};
use crate::machine::{Machine, Stage2Id};
use crate::ownership::guest::GuestSpace;
use crate::pool::records::{Record, Records};
use crate::sync::{AtomicBool, Lock, Mutex, MutexGuard, Ordering};
use abi::{Error, VmFlags, VmHandle};
use power::{Outcome, Power, Start};
use vcpu::{Residency, Vcpu};

/// VMs at a time. A VMID is the slot's number plus one and must fit 8 bits, 0 being the host's.
pub const MAX_VMS: usize = 255;
/// vCPUs of a VM.
pub const MAX_VCPUS: usize = 8;

/// Where a VM is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// It may run.
    Live,
    /// Its teardown has begun: nothing of it runs, its pages go back.
    Dying,
}

/// A vCPU as its VM sees it.
#[derive(Debug)]
enum VcpuSlot {
    Absent,
    Idle(Record<Vcpu>),
    /// Some CPU has claimed it.
    Claimed,
}

/// A virtual machine.
#[derive(Debug)]
pub struct Vm {
    pub(crate) flags: VmFlags,
    pub(crate) space: GuestSpace,
    pub(crate) phase: Phase,
    /// The guest has called `MMIO_GUARD_ENROLL`.
    pub(crate) guarded: bool,
    /// The host gave these pages, root included, and gets them back.
    pub(crate) given: u64,
    /// Which vCPU last ran on each CPU.
    pub(crate) residency: Residency,
    /// Power states of the vCPUs, by index.
    pub(crate) power: [Power; MAX_VCPUS],
    /// Where those start that are pending; zero otherwise.
    pub(crate) starts: [Start; MAX_VCPUS],
    vcpus: [VcpuSlot; MAX_VCPUS],
    /// vCPUs that exist: those with a lower index.
    created: usize,
    claimed: usize,
    /// Teardown has dropped the VM's translations.
    flushed: bool,
}

impl Vm {
    /// A VM without memory or vCPUs, over an empty root.
    pub fn new(flags: VmFlags, space: GuestSpace) -> Self {
        Self {
            flags,
            given: space.table.root_pages(),
            space,
            phase: Phase::Live,
            guarded: false,
            residency: Residency::new(),
            power: [Power::Off; MAX_VCPUS],
            starts: [Start::default(); MAX_VCPUS],
            vcpus: [const { VcpuSlot::Absent }; MAX_VCPUS],
            created: 0,
            claimed: 0,
            flushed: false,
        }
    }

    /// Its name.
    pub fn handle(&self) -> VmHandle {
        self.space.handle
    }

    /// Its translation.
    pub fn id(&self) -> Stage2Id {
        Stage2Id { vmid: vmid(self.handle()), root: self.space.table.root() }
    }

    /// Whether it may change hands of pages: it is alive.
    pub(crate) fn check_live(&self) -> Result<(), Error> {
        if self.phase == Phase::Live { Ok(()) } else { Err(Error::Permission) }
    }

    /// Whether a CPU has claimed a vCPU of it.
    pub(crate) fn is_claimed(&self) -> bool {
        self.claimed > 0
    }

    /// Whether it may get table pages: until its end has begun to take the tables apart. A dying VM may need
    /// some, to give back one page of a block.
    pub(crate) fn is_growable(&self) -> bool {
        !self.flushed
    }

    /// Adds a vCPU. They are made in the order of their indices.
    pub(crate) fn add_vcpu(&mut self, records: &Records, index: u64) -> Result<(), VcpuError> {
        self.check_live()?;
        let at = usize::try_from(index).map_err(|_| Error::Invalid)?;
        if at < self.created {
            return Err(Error::Exists.into());
        }
        if at != self.created {
            return Err(Error::Invalid.into());
        }
        let slot = self.vcpus.get_mut(at).ok_or(Error::Invalid)?;
        let record = records.alloc(Vcpu::new(index, self.flags)).map_err(VcpuError::Lacking)?;
        *slot = VcpuSlot::Idle(record);
        self.created = at.saturating_add(1);
        Ok(())
    }

    /// Takes a vCPU for this CPU alone.
    fn claim(&mut self, index: u64) -> Result<(usize, Record<Vcpu>), Error> {
        let live = self.check_live();
        let at = usize::try_from(index).map_err(|_| Error::NoEntry)?;
        let slot = self.vcpus.get_mut(at).ok_or(Error::NoEntry)?;
        if matches!(slot, VcpuSlot::Absent) {
            return Err(Error::NoEntry);
        }
        live?;
        match core::mem::replace(slot, VcpuSlot::Claimed) {
            VcpuSlot::Idle(record) => {
                self.claimed = self.claimed.saturating_add(1);
                Ok((at, record))
            }
            VcpuSlot::Absent | VcpuSlot::Claimed => Err(Error::Busy),
        }
    }

    /// Takes a claimed vCPU back.
    fn unclaim(&mut self, index: usize, vcpu: Record<Vcpu>) {
        if let Some(slot) = self.vcpus.get_mut(index) {
            *slot = VcpuSlot::Idle(vcpu);
            self.claimed = self.claimed.saturating_sub(1);
        }
    }

    /// Zeroes the registers of all its vCPUs, those that they were to start with included, in memory too.
    pub(crate) fn forget_registers<M: Machine>(&mut self, machine: &M) {
        for slot in &mut self.vcpus {
            if let VcpuSlot::Idle(record) = slot {
                record.context = context::Context::default();
                machine.clean_record(core::ptr::from_ref(&**record).cast(), size_of::<Vcpu>());
            }
        }
        self.forget_starts(machine);
    }

    /// Serves a PSCI call of vCPU `caller`, and keeps where a vCPU starts that it turns on.
    // It has one caller; called for itself it costs 136 bytes more.
    #[inline(always)]
    pub(crate) fn serve_psci(
        &mut self,
        function: u32,
        arguments: [u64; 3],
        caller: usize,
    ) -> Option<Outcome> {
        let states = self.power.get_mut(..self.created).unwrap_or_default();
        let outcome = power::call(function, arguments, caller, states);
        if let Some(Outcome::TurnedOn(target, start)) = outcome
            && let Some(place) = self.starts.get_mut(target as usize)
        {
            *place = start;
        }
        outcome
    }

    /// Takes where a vCPU starts that was pending.
    pub(crate) fn take_start(&mut self, index: usize) -> Start {
        self.starts.get_mut(index).map(core::mem::take).unwrap_or_default()
    }

    /// Zeroes what vCPUs were to start with, in memory too.
    fn forget_starts<M: Machine>(&mut self, machine: &M) {
        self.starts = Default::default();
        machine.clean_record(self.starts.as_ptr().cast(), size_of_val(&self.starts));
    }

    /// Begins the end. No vCPU starts any more.
    pub(crate) fn start_teardown<M: Machine>(&mut self, machine: &M) -> Result<(), Error> {
        self.check_live()?;
        if self.claimed > 0 {
            return Err(Error::Busy);
        }
        self.phase = Phase::Dying;
        self.forget_starts(machine);
        Ok(())
    }

    /// Checks that the VM may end.
    pub(crate) fn check_end(&self) -> Result<(), Error> {
        if self.phase != Phase::Dying {
            return Err(Error::Permission);
        }
        if self.space.pages > 0 {
            return Err(Error::Busy);
        }
        Ok(())
    }

    /// The next pages to give back: one that the pool holds, then a table, at last the root, all of it at once.
    pub(crate) fn next_pages<M: Machine>(&self, machine: &M) -> Option<Pages<Pfn>> {
        let table = &self.space.table;
        match self.space.cache.top().or_else(|| table.lowest_table(machine)) {
            Some(page) => Some(Pages::one(page)),
            None => Pages::new(table.root(), table.root_pages()),
        }
    }

    /// Takes the pages that [`next_pages`](Self::next_pages) has told out of use. The first time, the VM's translations
    /// are dropped, and nothing of it grows any more. The root is out of use then.
    pub(crate) fn release_pages<M: Machine>(&mut self, machine: &M, pages: Pages<Pfn>) {
        if !self.flushed {
            machine.retire_stage2(self.id());
            self.flushed = true;
        }
        let released = self.space.cache.pop(machine).or_else(|| self.space.table.unlink_table(machine));
        if pages.start() != released.unwrap_or(self.space.table.root()) {
            crate::broken("a page goes back that is still in use");
        }
    }
}

/// Why a vCPU was not made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum VcpuError {
    Refused(Error),
    Lacking(crate::pool::Lacking),
}

impl From<Error> for VcpuError {
    fn from(error: Error) -> Self {
        Self::Refused(error)
    }
}

/// VMID of a VM.
pub(crate) fn vmid(handle: VmHandle) -> u16 {
    u16::from(handle.slot()).saturating_add(1)
}

/// A vCPU that this CPU has claimed: nobody else can reach its record until
/// `Hypervisor::unclaim`.
#[derive(Debug)]
pub struct Claim {
    /// Its record.
    pub vcpu: Record<Vcpu>,
    /// Its VM's translation.
    pub id: Stage2Id,
    /// Its VM's properties.
    pub flags: VmFlags,
    /// Its VM.
    pub handle: VmHandle,
    /// Its index, below [`MAX_VCPUS`].
    pub index: usize,
}

/// A slot of the table.
#[derive(Debug)]
struct Place {
    slot: Mutex<Slot>,
    /// The guest has turned itself off, or did what ends it: nothing of it is entered again. Read before each
    /// entry into the guest, so it stands beside the lock.
    ended: AtomicBool,
}

#[derive(Debug)]
struct Slot {
    /// Generation of the VM that is there or will be next.
    generation: u32,
    vm: Option<Record<Vm>>,
}

/// All VMs.
#[derive(Debug)]
pub struct Vms {
    /// Held while a VM is created, so that two creations do not choose the same slot.
    pub(crate) creation: Mutex<()>,
    places: [Place; MAX_VMS],
}

/// The lock of a VM, held.
#[derive(Debug)]
pub struct VmGuard<'a>(MutexGuard<'a, Slot>);

impl Vms {
    /// No VMs.
    pub fn new() -> Self {
        Self {
            creation: Mutex::new(Lock::Creation, ()),
            places: core::array::from_fn(|number| {
                let slot = Slot { generation: 1, vm: None };
                // There are no more VMs than fit.
                let lock = Lock::Vm(u8::try_from(number).unwrap_or(u8::MAX));
                Place { slot: Mutex::new(lock, slot), ended: AtomicBool::new(false) }
            }),
        }
    }

    /// Locks the VM with this handle; `None` if there is none, or none any more.
    #[inline(never)]
    pub fn lock(&self, handle: VmHandle) -> Option<VmGuard<'_>> {
        let slot = self.places.get(usize::from(handle.slot()))?.slot.lock();
        let current = slot.vm.as_ref().map(|vm| vm.handle());
        (current == Some(handle)).then_some(VmGuard(slot))
    }

    /// Handle of the next VM, in a free slot; `None` if there is none. Call with the creation lock held.
    pub(crate) fn free_handle(&self, _creation: &MutexGuard<'_, ()>) -> Option<VmHandle> {
        self.places.iter().enumerate().find_map(|(number, place)| {
            let slot = place.slot.lock();
            if slot.vm.is_some() {
                return None;
            }
            // A slot whose generations are used up makes no handle any more: it is retired.
            VmHandle::new(u8::try_from(number).ok()?, slot.generation)
        })
    }

    /// Puts a VM into the slot of its handle, which [`free_handle`](Self::free_handle) chose.
    pub(crate) fn insert(&self, _creation: &MutexGuard<'_, ()>, vm: Record<Vm>) {
        if let Some(place) = self.places.get(usize::from(vm.handle().slot())) {
            place.ended.store(false, Ordering::SeqCst);
            place.slot.lock().vm = Some(vm);
        }
    }

    /// Ends a VM that cannot go away meanwhile, a vCPU of it being claimed: nothing of it is entered again.
    pub(crate) fn end(&self, claim: &Claim) {
        if let Some(place) = self.places.get(usize::from(claim.handle.slot())) {
            place.ended.store(true, Ordering::SeqCst);
        }
    }

    /// Whether that has happened.
    pub(crate) fn has_ended(&self, claim: &Claim) -> bool {
        let place = self.places.get(usize::from(claim.handle.slot()));
        place.is_none_or(|place| place.ended.load(Ordering::SeqCst))
    }

    /// Takes an end back, for tests that go on.
    #[cfg(test)]
    pub(crate) fn revive(&self, vm: VmHandle) {
        self.places[usize::from(vm.slot())].ended.store(false, Ordering::SeqCst);
    }

    /// Shows every VM to `visit`, one lock at a time.
    #[cfg(any(test, feature = "sim"))]
    pub(crate) fn for_each(&self, mut visit: impl FnMut(&mut Vm)) {
        for place in &self.places {
            if let Some(vm) = place.slot.lock().vm.as_mut() {
                visit(vm);
            }
        }
    }

    /// Shows every VM to `visit`, one lock at a time, once no CPU has a vCPU of it claimed. For a machine that is closed:
    /// no CPU can claim one for long any more.
    pub(crate) fn for_each_idle(&self, mut visit: impl FnMut(&mut Vm)) {
        for place in &self.places {
            loop {
                let mut slot = place.slot.lock();
                match slot.vm.as_mut() {
                    Some(vm) if vm.is_claimed() => {}
                    Some(vm) => break visit(vm),
                    None => break,
                }
                drop(slot);
                crate::sync::relax();
            }
        }
    }
}

impl Default for Vms {
    fn default() -> Self {
        Self::new()
    }
}

impl VmGuard<'_> {
    /// Takes the VM out of its slot, for ever: the next one has another generation.
    pub(crate) fn remove<M: Machine>(mut self, machine: &M, records: &Records) {
        let Some(mut vm) = self.0.vm.take() else { return };
        self.0.generation = self.0.generation.saturating_add(1);
        for slot in &mut vm.vcpus {
            if let VcpuSlot::Idle(record) = core::mem::replace(slot, VcpuSlot::Absent) {
                records.free(machine, record);
            }
        }
        records.free(machine, vm);
    }
}

impl core::ops::Deref for VmGuard<'_> {
    type Target = Vm;

    fn deref(&self) -> &Vm {
        match &self.0.vm {
            Some(vm) => vm,
            None => crate::broken("a locked VM is gone"),
        }
    }
}

impl core::ops::DerefMut for VmGuard<'_> {
    fn deref_mut(&mut self) -> &mut Vm {
        match &mut self.0.vm {
            Some(vm) => vm,
            None => crate::broken("a locked VM is gone"),
        }
    }
}

impl<M: Machine> crate::Hypervisor<M> {
    /// Claims a vCPU for this CPU.
    ///
    /// # Errors
    /// `NoEntry` if there is no such VM or vCPU, `Permission` if the VM has ended or is dying or the machine
    /// goes down, `Busy` if another CPU has the vCPU.
    pub(crate) fn claim(&self, handle: VmHandle, vcpu: u64) -> Result<Claim, Error> {
        self.claim_if(handle, vcpu, |_, _| Ok(())).map(|(claim, ())| claim)
    }

    /// Claims a vCPU for this CPU if `allow`, which is shown the VM and the index, says so, in one hold of
    /// the VM's lock.
    ///
    /// # Errors
    /// As [`claim`](Self::claim), or as `allow` says.
    #[inline]
    pub(crate) fn claim_if<R>(
        &self,
        handle: VmHandle,
        vcpu: u64,
        allow: impl FnOnce(&mut Vm, usize) -> Result<R, Error>,
    ) -> Result<(Claim, R), Error> {
        let mut guard = self.vms.lock(handle).ok_or(Error::NoEntry)?;
        let vm = &mut *guard;
        let (index, vcpu) = vm.claim(vcpu)?;
        let claim = Claim { vcpu, id: vm.id(), flags: vm.flags, handle, index };
        // Under the lock: whoever closes the machine or ends the VM finds either no claim or one that sees it.
        let allowed = if self.may_enter(&claim) { allow(vm, index) } else { Err(Error::Permission) };
        match allowed {
            Ok(allowed) => Ok((claim, allowed)),
            Err(error) => {
                vm.unclaim(index, claim.vcpu);
                Err(error)
            }
        }
    }

    /// Whether a guest may be entered: its VM has not ended, and the machine does not go down.
    #[inline]
    pub(crate) fn may_enter(&self, claim: &Claim) -> bool {
        !self.closed.load(Ordering::SeqCst) && !self.vms.has_ended(claim)
    }

    /// Gives a claimed vCPU back to its VM.
    pub(crate) fn unclaim(&self, claim: Claim) {
        let Some(mut vm) = self.vms.lock(claim.handle) else {
            crate::broken("a VM ended while a vCPU of it was claimed");
        };
        vm.unclaim(claim.index, claim.vcpu);
    }

    /// Does something with a VM under its lock; `None` if there is no such VM.
    pub(crate) fn with_vm<R>(&self, handle: VmHandle, f: impl FnOnce(&mut Vm) -> R) -> Option<R> {
        self.vms.lock(handle).map(|mut vm| f(&mut vm))
    }
}

/// Checks that a host gave a root that can be one: aligned to its own size.
pub(crate) fn root_pages(first: u64) -> Result<Pages<Pfn>, Error> {
    let count = abi::host::VM_ROOT_PAGES;
    let pages = Pages::<Pfn>::from_raw(first, count).ok_or(Error::Invalid)?;
    if pages.start().as_u64() % count == 0 { Ok(pages) } else { Err(Error::Invalid) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::World;
    use abi::host::HostCall;

    #[test]
    fn a_root_that_is_not_aligned_to_its_size_is_refused() {
        assert_eq!(root_pages(7), Err(Error::Invalid));
        assert_eq!(root_pages(u64::MAX), Err(Error::Invalid));
        assert_eq!(root_pages(8).map(|pages| pages.count()), Ok(2));
    }

    #[test]
    fn a_claimed_vcpu_is_nobody_elses_and_holds_teardown_up() {
        let world = World::new();
        let vm = world.protected_vm();
        world.ok(abi::HostCall::VcpuCreate { vm, vcpu: 0 });
        let claim = world.hyp.claim(vm, 0).unwrap();
        assert_eq!(world.hyp.claim(vm, 0).err(), Some(Error::Busy));
        assert_eq!(world.hyp.claim(vm, 1).err(), Some(Error::NoEntry));
        let start = abi::HostCall::VmTeardownStart { vm };
        assert_eq!(world.call(start).outcome, Err(Error::Busy));
        world.hyp.unclaim(claim);
        assert_eq!(world.call(start).outcome, Ok(()));
        assert_eq!(world.hyp.claim(vm, 0).err(), Some(Error::Permission));
    }

    #[test]
    fn registers_are_gone_before_the_machine_is_turned_off() {
        let world = World::new();
        let vm = world.vm(abi::VmFlags::default(), 0x1000, 8);
        world.ok(HostCall::VcpuCreate { vm, vcpu: 0 });
        world.ok(HostCall::VcpuSetReg { vm, vcpu: 0, register: 3, value: 0x5ec2e7 });
        let register = || match &world.hyp.vms.lock(vm).unwrap().vcpus[..] {
            [VcpuSlot::Idle(vcpu), ..] => vcpu.context.x[3],
            _ => panic!("the vCPU is idle"),
        };
        assert_eq!(register(), 0x5ec2e7);
        world.hyp.machine().take_cleaned();
        world.hyp.wipe_all_guests();
        assert_eq!(register(), 0);
        assert_eq!(world.hyp.machine().take_cleaned(), [size_of::<Vcpu>(), size_of::<[Start; MAX_VCPUS]>()]);
    }

    #[test]
    fn a_vcpu_that_is_not_there_is_no_entry_also_in_a_dying_vm() {
        let world = World::new();
        let vm = world.protected_vm();
        world.ok(abi::HostCall::VcpuCreate { vm, vcpu: 0 });
        world.ok(abi::HostCall::VmTeardownStart { vm });
        assert_eq!(world.hyp.claim(vm, 0).err(), Some(Error::Permission));
        for absent in [1, MAX_VCPUS as u64, u64::MAX] {
            assert_eq!(world.hyp.claim(vm, absent).err(), Some(Error::NoEntry));
            let ack = abi::HostCall::UnshareAck { vm, vcpu: absent };
            assert_eq!(world.call(ack).outcome, Err(Error::NoEntry));
        }
    }

    #[test]
    fn the_host_and_every_vm_have_vmids_of_their_own_in_8_bits() {
        let last = VmHandle::new(MAX_VMS as u8 - 1, 1).unwrap();
        assert_eq!(vmid(last), 255);
        assert_eq!(vmid(VmHandle::new(0, 1).unwrap()), 1);
    }
}
