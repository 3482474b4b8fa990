//! A vCPU's record: its registers, and what its last exit left to be done.
//!
//! The record is used by whoever has claimed the vCPU; a claim is exclusive, so it needs no lock. What the
//! host may read and write of it is decided here: nothing of a protected vCPU, and of another only values
//! that the vCPU could have reached by itself (invariants I8 and I10).

use crate::addr::{Gfn, Pages};
use crate::vm::context::{Context, El1, pstate};
use crate::vm::mmio::Access;
use crate::vm::power;
use abi::host::register;
use abi::{Error, VmFlags};

/// What must be done before a vCPU goes on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Pending {
    /// Nothing.
    #[default]
    None,
    /// The host serves this access to a device before the next run, and gives the value of a load with it.
    Mmio(Access),
    /// The host gives x0 to x3 with the next run.
    GuestCall,
    /// The guest wants these pages back: the host's acknowledgement, or the next run, takes them.
    Unshare(Pages<Gfn>),
}

/// A vCPU.
#[derive(Clone, Debug)]
pub struct Vcpu {
    /// Its registers.
    pub context: Context,
    /// What its last exit left to be done.
    pub pending: Pending,
    index: u64,
    protected: bool,
}

impl Vcpu {
    /// Makes a vCPU in its reset state.
    pub fn new(index: u64, flags: VmFlags) -> Self {
        Self {
            context: Context::reset(power::mpidr(index), 0, 0),
            pending: Pending::None,
            index,
            protected: flags.protected,
        }
    }

    /// Puts it into its reset state, to start at `pc` with `x0`: what was there before is gone.
    pub fn reset(&mut self, pc: u64, x0: u64) {
        self.context = Context::reset(power::mpidr(self.index), pc, x0);
        self.pending = Pending::None;
    }

    /// Gives the boot vCPU its entry. The registers of a protected one are reset with it; of another, the
    /// host may have set some already, and they stay.
    pub fn set_boot(&mut self, pc: u64, x0: u64) {
        if self.protected {
            self.reset(pc, x0);
        } else {
            self.context.pc = pc;
            self.context.set_x(0, x0);
        }
    }

    /// Reads a register for the host, numbered as [`abi::host::register`] says.
    ///
    /// # Errors
    /// `Permission` for a protected vCPU, `Invalid` if there is no such register.
    pub fn register(&self, number: u64) -> Result<u64, Error> {
        if self.protected {
            return Err(Error::Permission);
        }
        let context = &self.context;
        Ok(match number {
            0..=30 => context.x(number as u8),
            register::PC => context.pc,
            register::PSTATE => context.pstate,
            register::SP_EL0 => context.el1.sp_el0,
            register::SP_EL1 => context.el1.sp_el1,
            _ => system_register(&context.el1, number).ok_or(Error::Invalid)?,
        })
    }

    /// Writes a register for the host.
    ///
    /// # Errors
    /// `Permission` for a protected vCPU, `Invalid` if there is no such register or if the vCPU could never
    /// have this value in it.
    pub fn set_register(&mut self, number: u64, value: u64) -> Result<(), Error> {
        if self.protected {
            return Err(Error::Permission);
        }
        let context = &mut self.context;
        match number {
            0..=30 => context.set_x(number as u8, value),
            register::PC => context.pc = value,
            register::PSTATE if is_guest_pstate(value) => context.pstate = value,
            register::SP_EL0 => context.el1.sp_el0 = value,
            register::SP_EL1 => context.el1.sp_el1 = value,
            _ => set_system_register(&mut context.el1, number, value).ok_or(Error::Invalid)?,
        }
        Ok(())
    }
}

/// Which vCPU of a VM last ran on each CPU. Guarded by the VM's lock.
///
/// Two vCPUs of a VM share a VMID but not their stage-1 tables: what one leaves in the TLB or the
/// instruction cache of a CPU must not serve the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Residency {
    last: [u8; Self::CPUS],
}

impl Residency {
    /// CPUs that are told apart. On any other a change of vCPU is always assumed.
    const CPUS: usize = 16;
    const NOBODY: u8 = u8::MAX;

    /// Nobody has run anywhere.
    pub const fn new() -> Self {
        Self { last: [Self::NOBODY; Self::CPUS] }
    }

    /// Notes that a vCPU enters a CPU. Returns whether another of the VM was the last one there.
    pub fn enter(&mut self, cpu: usize, vcpu: usize) -> bool {
        // There are fewer vCPUs than 255; one that could not be told from NOBODY counts as a change.
        let vcpu = u8::try_from(vcpu).unwrap_or(Self::NOBODY);
        match self.last.get_mut(cpu) {
            Some(last) => {
                let before = core::mem::replace(last, vcpu);
                before != vcpu && before != Self::NOBODY || vcpu == Self::NOBODY
            }
            None => true,
        }
    }
}

impl Default for Residency {
    fn default() -> Self {
        Self::new()
    }
}

/// Whether a vCPU could be in this processor state: AArch64, EL0 or EL1, nothing that Deed keeps for itself.
fn is_guest_pstate(value: u64) -> bool {
    let allowed = pstate::NZCV
        | pstate::TCO
        | pstate::DIT
        | pstate::UAO
        | pstate::PAN
        | pstate::SSBS
        | pstate::BTYPE
        | pstate::DAIF
        | pstate::MODE;
    let mode = value & (pstate::MODE | pstate::AARCH32);
    value & !allowed == 0 && matches!(mode, pstate::EL0T | pstate::EL1T | pstate::EL1H)
}

macro_rules! system_registers {
    ($($number:path => $name:ident,)*) => {
        /// Reads a system register by its number in the interface.
        fn system_register(el1: &El1, number: u64) -> Option<u64> {
            match number {
                $($number => Some(el1.$name),)*
                _ => None,
            }
        }

        /// Writes one; `None` if there is none with this number.
        fn set_system_register(el1: &mut El1, number: u64, value: u64) -> Option<()> {
            match number {
                $($number => el1.$name = value,)*
                _ => return None,
            }
            Some(())
        }
    };
}

// MPIDR_EL1 and MDSCR_EL1 are not among them: EL2 alone decides what they are.
system_registers! {
    register::SCTLR_EL1 => sctlr_el1,
    register::CPACR_EL1 => cpacr_el1,
    register::TTBR0_EL1 => ttbr0_el1,
    register::TTBR1_EL1 => ttbr1_el1,
    register::TCR_EL1 => tcr_el1,
    register::ESR_EL1 => esr_el1,
    register::AFSR0_EL1 => afsr0_el1,
    register::AFSR1_EL1 => afsr1_el1,
    register::FAR_EL1 => far_el1,
    register::MAIR_EL1 => mair_el1,
    register::VBAR_EL1 => vbar_el1,
    register::CONTEXTIDR_EL1 => contextidr_el1,
    register::TPIDR_EL0 => tpidr_el0,
    register::TPIDRRO_EL0 => tpidrro_el0,
    register::TPIDR_EL1 => tpidr_el1,
    register::AMAIR_EL1 => amair_el1,
    register::CNTKCTL_EL1 => cntkctl_el1,
    register::PAR_EL1 => par_el1,
    register::ELR_EL1 => elr_el1,
    register::SPSR_EL1 => spsr_el1,
    register::CSSELR_EL1 => csselr_el1,
    register::CNTV_CTL_EL0 => cntv_ctl_el0,
    register::CNTV_CVAL_EL0 => cntv_cval_el0,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vcpu(protected: bool) -> Vcpu {
        Vcpu::new(1, VmFlags { protected, ..VmFlags::default() })
    }

    #[test]
    fn no_register_of_a_protected_vcpu_is_the_hosts() {
        let mut vcpu = vcpu(true);
        let before = vcpu.context.clone();
        for number in 0..=128 {
            assert_eq!(vcpu.register(number), Err(Error::Permission));
            assert_eq!(vcpu.set_register(number, 1), Err(Error::Permission));
        }
        assert_eq!(vcpu.context, before);
    }

    #[test]
    fn every_register_of_an_unprotected_vcpu_reads_as_it_was_written() {
        let mut vcpu = vcpu(false);
        let numbers = || (0..=31).chain(33..=34).chain(64..=86);
        for number in numbers() {
            vcpu.set_register(number, number * 3 + 1).unwrap();
        }
        for number in numbers() {
            assert_eq!(vcpu.register(number), Ok(number * 3 + 1), "register {number}");
        }
        for number in [35, 63, 87, u64::MAX] {
            assert_eq!(vcpu.register(number), Err(Error::Invalid), "register {number}");
            assert_eq!(vcpu.set_register(number, 0), Err(Error::Invalid), "register {number}");
        }
    }

    #[test]
    fn a_processor_state_beyond_el1_or_in_aarch32_is_refused() {
        let mut vcpu = vcpu(false);
        for value in [0x3c9, 0x3cd, 0x10, 0x1d3, 0x3c1, 0x3c7, 0x3c5 | 1 << 20, 0x3c5 | 1 << 21, 1 << 32] {
            assert_eq!(vcpu.set_register(register::PSTATE, value), Err(Error::Invalid), "{value:#x}");
        }
        for value in [0, 0x3c4, 0x3c5, 0xf000_03c5] {
            assert_eq!(vcpu.set_register(register::PSTATE, value), Ok(()));
            assert_eq!(vcpu.register(register::PSTATE), Ok(value));
        }
    }

    /// Bits by the Arm ARM, C5.2.19 (SPSR_EL2): DAIF, BTYPE, SSBS, PAN, UAO, DIT, TCO and NZCV, each by itself in EL1h.
    #[test]
    fn the_processor_state_of_a_vcpu_has_only_what_a_guest_may_have() {
        let allowed = [6, 7, 8, 9, 10, 11, 12, 22, 23, 24, 25, 28, 29, 30, 31];
        for bit in 4..64 {
            let is_taken = vcpu(false).set_register(register::PSTATE, 1 << bit | 0b0101).is_ok();
            assert_eq!(is_taken, allowed.contains(&bit), "bit {bit}");
        }
        assert!(is_guest_pstate(allowed.iter().fold(0b0101, |all, bit| all | 1 << bit)));
    }

    #[test]
    fn a_cpu_forgets_only_when_the_vcpu_changes() {
        let mut residency = Residency::new();
        assert!(!residency.enter(0, 1));
        assert!(!residency.enter(0, 1));
        assert!(residency.enter(0, 2));
        assert!(!residency.enter(1, 1));
        assert!(residency.enter(0, 1));
        assert!(residency.enter(99, 1));
    }

    #[test]
    fn the_entry_of_a_protected_vcpu_starts_from_reset() {
        let mut vcpu = vcpu(true);
        vcpu.context.set_x(5, 5);
        vcpu.set_boot(0x8000_0000, 1);
        assert_eq!(vcpu.context, Context::reset(power::mpidr(1), 0x8000_0000, 1));
    }
}
