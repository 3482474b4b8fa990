//! The table of VMs: a slot for each VM that there can be.
//!
//! A handle is a slot and the slot's generation, which never repeats (I9). The lock of a slot guards everything
//! about its VM, except the record of a vCPU that some CPU has claimed: that CPU owns it. `Vms::creation` is taken
//! before any other lock, and only to create a VM.

use super::{Claim, MAX_VMS, VcpuSlot, Vm};
use crate::machine::Machine;
use crate::pool::records::{Record, Records};
use crate::sync::{AtomicBool, Lock, Mutex, MutexGuard, Ordering};
use abi::VmHandle;

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

    /// Shows every VM to `visit`, one lock at a time, once no CPU has a vCPU of it claimed. For a machine that is
    /// closed: no CPU can claim one for long any more.
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
    /// Does something with a VM under its lock; `None` if there is no such VM.
    pub(crate) fn with_vm<R>(&self, handle: VmHandle, f: impl FnOnce(&mut Vm) -> R) -> Option<R> {
        self.vms.lock(handle).map(|mut vm| f(&mut vm))
    }
}
