//! What a vCPU is made of: every register that a guest can reach, and why it stopped.
//!
//! A [`Context`] belongs to one vCPU record and is used by the CPU that has claimed that vCPU; it needs no
//! lock of its own. It upholds its half of invariant I10: every register that a guest can reach is either a
//! field here, and switched by `arch::world_switch`, or trapped by `arch::traps`. The layout is `repr(C)`
//! because assembly reads it, through offsets taken with `offset_of!`.

/// Processor states, in the format of SPSR_EL2 (Arm ARM, C5.2).
pub mod pstate {
    /// All of D, A, I and F.
    pub const DAIF: u64 = 0xf << 6;
    /// EL1 with its own stack pointer.
    pub const EL1H: u64 = 0b0101;
    /// EL1 with the stack pointer of EL0.
    pub const EL1T: u64 = 0b0100;
    /// EL0.
    pub const EL0T: u64 = 0b0000;
    /// Exception level and stack pointer (M\[3:0\]).
    pub const MODE: u64 = 0xf;
    /// AArch32 state (M\[4\]).
    pub const AARCH32: u64 = 1 << 4;
    /// Speculative store bypass is safe (FEAT_SSBS).
    pub const SSBS: u64 = 1 << 12;
    /// Illegal execution state.
    pub const IL: u64 = 1 << 20;
    /// Software step.
    pub const SS: u64 = 1 << 21;
    /// Privileged access never.
    pub const PAN: u64 = 1 << 22;
    /// User access override.
    pub const UAO: u64 = 1 << 23;
    /// Data-independent timing.
    pub const DIT: u64 = 1 << 24;
    /// Tag check override.
    pub const TCO: u64 = 1 << 25;
    /// Condition flags.
    pub const NZCV: u64 = 0xf << 28;
    /// Branch target type (FEAT_BTI).
    pub const BTYPE: u64 = 0b11 << 10;
    /// What a vCPU starts with: EL1h, everything masked.
    pub const RESET: u64 = EL1H | DAIF;
}

/// SCTLR_EL1 of a vCPU at reset: MMU and caches off, little-endian, the RES1 bits of Armv8.0 set.
pub const SCTLR_RESET: u64 = 0x30d0_0800;

/// The system registers of EL1 and EL0 that a guest can reach, and the two that stand for them at EL2.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[repr(C)]
#[expect(missing_docs, reason = "the fields are the architecture's registers, by their names")]
pub struct El1 {
    pub sp_el0: u64,
    pub sp_el1: u64,
    pub elr_el1: u64,
    pub spsr_el1: u64,
    pub sctlr_el1: u64,
    pub tcr_el1: u64,
    pub ttbr0_el1: u64,
    pub ttbr1_el1: u64,
    pub mair_el1: u64,
    pub amair_el1: u64,
    pub vbar_el1: u64,
    pub contextidr_el1: u64,
    pub esr_el1: u64,
    pub far_el1: u64,
    pub afsr0_el1: u64,
    pub afsr1_el1: u64,
    pub cpacr_el1: u64,
    pub par_el1: u64,
    pub tpidr_el0: u64,
    pub tpidrro_el0: u64,
    pub tpidr_el1: u64,
    pub csselr_el1: u64,
    pub cntkctl_el1: u64,
    pub cntv_cval_el0: u64,
    pub cntv_ctl_el0: u64,
    /// Always 0 in a guest, which traps when it touches it; a host's value is kept while a guest runs.
    pub mdscr_el1: u64,
    /// What MPIDR_EL1 reads as.
    pub vmpidr_el2: u64,
    /// FEAT_SME only: SME itself is hidden, but its thread pointer is not everywhere trapped.
    pub tpidr2_el0: u64,
    /// What DISR_EL1 names while SErrors are routed to EL2 (FEAT_RAS only).
    pub vdisr_el2: u64,
}

/// Floating point and Advanced SIMD.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[repr(C, align(16))]
#[expect(missing_docs, reason = "the fields are the architecture's registers, by their names")]
pub struct Fp {
    pub fpcr: u64,
    pub fpsr: u64,
    pub v: [u128; 32],
}

/// The keys of pointer authentication, low half first, in the order IA, IB, DA, DB, GA (FEAT_PAuth only).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Keys {
    /// APIAKeyLo_EL1, APIAKeyHi_EL1, APIBKeyLo_EL1, and so on.
    pub halves: [u64; 10],
}

/// EL2 registers that differ between host and guest, as the host had them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[repr(C)]
#[expect(missing_docs, reason = "the fields are the architecture's registers, by their names")]
pub struct HostTraps {
    pub elr_el2: u64,
    pub spsr_el2: u64,
    pub hcr_el2: u64,
    pub vttbr_el2: u64,
    pub mdcr_el2: u64,
    pub pmcr_el0: u64,
    pub pmuserenr_el0: u64,
    pub pmselr_el0: u64,
    pub hcrx_el2: u64,
    pub mpam2_el2: u64,
    pub trfcr_el1: u64,
    /// HFGRTR, HFGWTR, HFGITR, HDFGRTR, HDFGWTR, and the second of each (FEAT_FGT, FEAT_FGT2).
    pub fine_grained: [u64; 10],
}

/// What this CPU's host had when the vCPU was put on it. Without meaning while the vCPU is on no CPU.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Host {
    pub(crate) el1: El1,
    pub(crate) fp: Fp,
    pub(crate) keys: Keys,
    pub(crate) traps: HostTraps,
}

/// All architectural state of a vCPU.
///
/// While the vCPU is loaded on a CPU ([`crate::machine::Machine::load`]) only `x`, `pc` and `pstate` are
/// valid here; the rest is in the CPU's registers until [`crate::machine::Machine::unload`].
#[derive(Clone, Debug, PartialEq, Eq)]
#[repr(C, align(16))]
pub struct Context {
    /// x0 to x30.
    pub x: [u64; 31],
    /// Where it goes on.
    pub pc: u64,
    /// Its processor state, in the format of SPSR_EL2.
    pub pstate: u64,
    /// System registers.
    pub el1: El1,
    /// Floating point.
    pub fp: Fp,
    /// Pointer authentication.
    pub keys: Keys,
    pub(crate) host: Host,
}

impl Context {
    /// A vCPU as it comes out of reset: EL2 decides every register, and the entry point and x0 alone are
    /// given (docs/hypercalls.md, PSCI for guests).
    pub fn reset(mpidr: u64, pc: u64, x0: u64) -> Self {
        let mut context = Self { pc, ..Self::default() };
        context.set_x(0, x0);
        context.el1.vmpidr_el2 = mpidr;
        context
    }

    /// Reads x0 to x30; any other number is the zero register.
    pub fn x(&self, register: u8) -> u64 {
        self.x.get(usize::from(register)).copied().unwrap_or(0)
    }

    /// Writes x0 to x30; a write to any other number is dropped, as the zero register does.
    pub fn set_x(&mut self, register: u8, value: u64) {
        if let Some(slot) = self.x.get_mut(usize::from(register)) {
            *slot = value;
        }
    }

    /// Steps over the trapped instruction.
    pub fn skip_instruction(&mut self) {
        self.pc = self.pc.wrapping_add(4);
        // A branch target check and a step concern the instruction that was skipped.
        self.pstate &= !(pstate::BTYPE | pstate::SS);
    }

    /// Goes back to the HVC that was just taken: its preferred return address is behind it.
    pub fn rewind_call(&mut self) {
        self.pc = self.pc.wrapping_sub(4);
    }
}

impl Default for Context {
    fn default() -> Self {
        Self {
            x: [0; 31],
            pc: 0,
            pstate: pstate::RESET,
            el1: El1 { sctlr_el1: SCTLR_RESET, vmpidr_el2: MPIDR_RES1, ..El1::default() },
            fp: Fp::default(),
            keys: Keys::default(),
            host: Host::default(),
        }
    }
}

/// The bit of MPIDR_EL1 that always reads as 1.
pub const MPIDR_RES1: u64 = 1 << 31;

/// Why a guest stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trap {
    /// A synchronous exception was taken to EL2.
    Sync {
        /// ESR_EL2.
        esr: u64,
        /// FAR_EL2, for an abort; otherwise 0.
        far: u64,
        /// The IPA of the fault in the format of HPFAR_EL2, for a stage-2 abort; otherwise 0. Where the
        /// register itself is not valid, the address was translated again.
        hpfar: u64,
    },
    /// A physical interrupt is pending. EL2 does not acknowledge it.
    Irq,
    /// A physical SError was taken.
    SError {
        /// ESR_EL2.
        esr: u64,
    },
    /// A stage-2 abort whose address can no longer be found, because another vCPU has changed the guest's
    /// tables: the access has to be tried again.
    Retry,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vcpu_out_of_reset_has_nothing_but_its_entry() {
        let context = Context::reset(MPIDR_RES1 | 3, 0x8000_0000, 7);
        assert_eq!((context.pc, context.x(0), context.pstate), (0x8000_0000, 7, 0x3c5));
        assert_eq!(context.x[1..], [0; 30]);
        let el1 = El1 { sctlr_el1: SCTLR_RESET, vmpidr_el2: MPIDR_RES1 | 3, ..El1::default() };
        assert_eq!((context.el1, context.fp, context.keys), (el1, Fp::default(), Keys::default()));
    }

    #[test]
    fn register_31_reads_as_zero_and_drops_writes() {
        let mut context = Context::default();
        context.set_x(31, 5);
        context.set_x(30, 6);
        assert_eq!((context.x(31), context.x(30), context.x(255)), (0, 6, 0));
    }

    #[test]
    fn a_skipped_instruction_leaves_no_branch_target_check_behind() {
        let mut context = Context { pc: u64::MAX - 3, ..Context::default() };
        context.pstate |= 1 << 21 | 0b11 << 10;
        context.skip_instruction();
        assert_eq!((context.pc, context.pstate), (0, pstate::RESET));
    }
}
