//! Registers of vCPUs by KVM's ids (`KVM_GET_ONE_REG`, `KVM_SET_ONE_REG`).
//!
//! A protected vCPU's registers are not the host's: of vCPU 0, before the VM's first run, pc and x0 can be
//! set, and nothing can ever be read.

use abi::HostCall;
use abi::host::register;

use super::vm::{Boot, VcpuRef};
use crate::errno::Errno;
use crate::host::Host;

const CORE: u64 = 0x6030_0000_0010_0000;
const SYSTEM: u64 = 0x6030_0000_0013_0000;
/// Id of x0.
pub const X0: u64 = CORE;
/// Id of the program counter.
pub const PC: u64 = CORE + 64;

/// Deed's number of a register by KVM's id; ENOENT if there is none.
pub fn register_of_id(id: u64) -> Result<u64, Errno> {
    if let Some(offset) = id.checked_sub(CORE).filter(|offset| *offset <= 0x44) {
        return match offset {
            offset if offset % 2 != 0 => Err(Errno::ENOENT),
            offset @ 0..=60 => Ok(offset / 2),
            62 => Ok(register::SP_EL0),
            64 => Ok(register::PC),
            66 => Ok(register::PSTATE),
            68 => Ok(register::SP_EL1),
            _ => Err(Errno::ENOENT),
        };
    }
    let encoding = id.checked_sub(SYSTEM).filter(|encoding| *encoding <= 0xffff).ok_or(Errno::ENOENT)?;
    SYSTEM_REGISTERS
        .iter()
        .find(|(known, _)| *known == encoding)
        .map(|(_, number)| *number)
        .ok_or(Errno::ENOENT)
}

/// Encodings (op0, op1, CRn, CRm, op2) of the system registers, and Deed's numbers of them.
const SYSTEM_REGISTERS: [(u64, u64); 23] = [
    (0xc080, register::SCTLR_EL1),
    (0xc082, register::CPACR_EL1),
    (0xc100, register::TTBR0_EL1),
    (0xc101, register::TTBR1_EL1),
    (0xc102, register::TCR_EL1),
    (0xc290, register::ESR_EL1),
    (0xc288, register::AFSR0_EL1),
    (0xc289, register::AFSR1_EL1),
    (0xc300, register::FAR_EL1),
    (0xc510, register::MAIR_EL1),
    (0xc600, register::VBAR_EL1),
    (0xc681, register::CONTEXTIDR_EL1),
    (0xde82, register::TPIDR_EL0),
    (0xde83, register::TPIDRRO_EL0),
    (0xc684, register::TPIDR_EL1),
    (0xc518, register::AMAIR_EL1),
    (0xc708, register::CNTKCTL_EL1),
    (0xc3a0, register::PAR_EL1),
    (0xc201, register::ELR_EL1),
    (0xc200, register::SPSR_EL1),
    (0xd000, register::CSSELR_EL1),
    (0xdf19, register::CNTV_CTL_EL0),
    (0xdf02, register::CNTV_CVAL_EL0),
];

/// Reads a register.
pub fn get(host: &mut Host, vcpu: &VcpuRef, id: u64) -> Result<u64, Errno> {
    check_initialised(vcpu)?;
    if vcpu.vm().is_protected() {
        return Err(Errno::EPERM);
    }
    let call =
        HostCall::VcpuGetReg { vm: vcpu.vm().handle(), vcpu: vcpu.id(), register: register_of_id(id)? };
    let [value, ..] = host.call(call)?.values;
    Ok(value)
}

/// Writes a register.
pub fn set(host: &mut Host, vcpu: &VcpuRef, id: u64, value: u64) -> Result<(), Errno> {
    check_initialised(vcpu)?;
    let vm = vcpu.vm();
    if !vm.is_protected() {
        let register = register_of_id(id)?;
        host.call(HostCall::VcpuSetReg { vm: vm.handle(), vcpu: vcpu.id(), register, value })?;
        return Ok(());
    }
    if vm.started.get() || vcpu.id() != 0 {
        return Err(Errno::EPERM);
    }
    vcpu.with(|vcpu| {
        let Boot { pc, x0 } = vcpu.boot.get();
        let boot = match id {
            PC => Boot { pc: value, x0 },
            X0 => Boot { pc, x0: value },
            _ => return Err(Errno::EPERM),
        };
        vcpu.boot.set(boot);
        Ok(())
    })?
}

fn check_initialised(vcpu: &VcpuRef) -> Result<(), Errno> {
    if vcpu.with(|vcpu| vcpu.initialised.get())? { Ok(()) } else { Err(Errno::ENOEXEC) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kvm::Vm;
    use crate::kvm::vm::TYPE_PROTECTED;
    use crate::testing::FakeMachine;
    use alloc::rc::Rc;

    fn vcpu(host: &mut Host, machine_type: u64, id: u64) -> VcpuRef {
        let vm = Rc::new(Vm::new(host, machine_type).unwrap());
        vm.create_vcpu(host, id).unwrap();
        let vcpu = VcpuRef::new(&vm, id).unwrap();
        vcpu.with(|vcpu| vcpu.initialised.set(true)).unwrap();
        vcpu
    }

    #[test]
    fn a_protected_vcpu_takes_its_entry_and_shows_nothing() {
        let machine = FakeMachine::new(32);
        let mut host = machine.host();
        let vcpu = vcpu(&mut host, TYPE_PROTECTED, 0);
        assert_eq!(set(&mut host, &vcpu, PC, 0x8000_0000), Ok(()));
        assert_eq!(set(&mut host, &vcpu, X0, 7), Ok(()));
        assert_eq!(vcpu.with(|vcpu| vcpu.boot.get()), Ok(Boot { pc: 0x8000_0000, x0: 7 }));
        assert_eq!(set(&mut host, &vcpu, CORE + 2, 1), Err(Errno::EPERM));
        assert_eq!(set(&mut host, &vcpu, SYSTEM | 0xc080, 1), Err(Errno::EPERM));
        for id in [PC, X0, CORE + 2, SYSTEM | 0xc080] {
            assert_eq!(get(&mut host, &vcpu, id), Err(Errno::EPERM));
        }
        vcpu.vm().started.set(true);
        assert_eq!(set(&mut host, &vcpu, PC, 0), Err(Errno::EPERM));
    }

    #[test]
    fn other_vcpus_of_a_protected_vm_take_nothing() {
        let machine = FakeMachine::new(32);
        let mut host = machine.host();
        let vcpu = vcpu(&mut host, TYPE_PROTECTED, 1);
        assert_eq!(set(&mut host, &vcpu, PC, 0), Err(Errno::EPERM));
    }

    #[test]
    fn kvms_ids_become_deeds_numbers() {
        assert_eq!(register_of_id(X0), Ok(0));
        assert_eq!(register_of_id(CORE + 60), Ok(30));
        assert_eq!(register_of_id(PC), Ok(register::PC));
        assert_eq!(register_of_id(CORE + 68), Ok(register::SP_EL1));
        assert_eq!(register_of_id(CORE + 1), Err(Errno::ENOENT));
        assert_eq!(register_of_id(0), Err(Errno::ENOENT));
        assert_eq!(register_of_id(SYSTEM | 0xc080), Ok(register::SCTLR_EL1));
        assert_eq!(register_of_id(SYSTEM | 0xdf19), Ok(register::CNTV_CTL_EL0));
    }
}
