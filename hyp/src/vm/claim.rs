//! Claims: a CPU takes a vCPU for itself, runs or changes it without any lock, and gives it back.
//!
//! A vCPU is claimed by one CPU at a time, and a VM with a claimed vCPU does not go away. A machine that goes down
//! lets nobody claim any more and waits for the claims that there are (`Vms::for_each_idle`).

use super::{VcpuSlot, Vm};
use crate::machine::{Machine, Stage2Id};
use crate::pool::records::Record;
use crate::sync::Ordering;
use crate::vm::vcpu::Vcpu;
use abi::{Error, VmFlags, VmHandle};

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
    /// Its index, below [`MAX_VCPUS`](super::MAX_VCPUS).
    pub index: usize,
}

impl Vm {
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
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::World;
    use crate::vm::MAX_VCPUS;

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
}
