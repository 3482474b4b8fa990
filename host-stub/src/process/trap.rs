//! What an exception from EL0 means (Arm ARM, ESR_EL1).

use super::context::UserContext;
use crate::mm::space::Access;

const EC_SHIFT: u32 = 26;
const EC_MASK: u64 = 0x3f;
const EC_UNKNOWN: u64 = 0x00;
const EC_SVC: u64 = 0x15;
const EC_FETCH_LOWER: u64 = 0x20;
const EC_FETCH_SAME: u64 = 0x21;
const EC_PC_ALIGNMENT: u64 = 0x22;
const EC_DATA_LOWER: u64 = 0x24;
const EC_DATA_SAME: u64 = 0x25;
const EC_SP_ALIGNMENT: u64 = 0x26;
const EC_FLOATING_POINT: u64 = 0x2c;
const EC_SOFTWARE_STEP: u64 = 0x32;
const EC_BREAKPOINT: u64 = 0x3c;

const ISS_FAULT_STATUS: u64 = 0x3f;
const ISS_WRITE: u64 = 1 << 6;
const ISS_S1PTW: u64 = 1 << 7;
const ISS_CACHE_MAINTENANCE: u64 = 1 << 8;

const FAULT_EXTERNAL: u64 = 0b01_0000;
const FAULT_ALIGNMENT: u64 = 0b10_0001;

/// What happened in EL0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trap {
    /// A system call.
    SystemCall,
    /// An interrupt.
    Interrupt,
    /// An access that stage 1 does not allow, or not yet.
    Fault {
        /// Its address.
        address: u64,
        /// Its kind.
        access: Access,
    },
    /// An access that EL2 (or the bus) refused: a synchronous external abort.
    External {
        /// Its address.
        address: u64,
        /// It has EL2's mark.
        marked: bool,
    },
    /// An access or a branch that is not aligned as it must be.
    Alignment {
        /// Its address.
        address: u64,
    },
    /// An instruction that EL0 does not have.
    Undefined,
    /// `BRK`, or a debug event.
    Breakpoint,
    /// A floating-point exception.
    FloatingPoint,
    /// Anything else, which no program should be able to cause.
    Unexpected,
}

fn class(esr: u64) -> u64 {
    (esr >> EC_SHIFT) & EC_MASK
}

/// Whether a syndrome is that of a synchronous external abort that Deed injected.
pub const fn is_marked_external_abort(esr: u64) -> bool {
    let class = (esr >> EC_SHIFT) & EC_MASK;
    matches!(class, EC_DATA_LOWER | EC_DATA_SAME | EC_FETCH_LOWER | EC_FETCH_SAME)
        && esr & ISS_FAULT_STATUS == FAULT_EXTERNAL
        && esr & ISS_S1PTW != 0
}

impl Trap {
    /// Reads what the last stay in EL0 ended with.
    pub fn of(context: &UserContext) -> Self {
        match context.vector {
            0 => Self::of_syndrome(context.esr, context.far, context.pc),
            1 | 2 => Self::Interrupt,
            _ => Self::Unexpected,
        }
    }

    fn of_syndrome(esr: u64, far: u64, pc: u64) -> Self {
        match class(esr) {
            EC_SVC => Self::SystemCall,
            EC_FETCH_LOWER => Self::abort(esr, far, Access::Execute),
            EC_DATA_LOWER => {
                let write = esr & ISS_WRITE != 0 && esr & ISS_CACHE_MAINTENANCE == 0;
                Self::abort(esr, far, if write { Access::Write } else { Access::Read })
            }
            EC_PC_ALIGNMENT => Self::Alignment { address: pc },
            EC_SP_ALIGNMENT => Self::Alignment { address: far },
            EC_FLOATING_POINT => Self::FloatingPoint,
            EC_BREAKPOINT => Self::Breakpoint,
            EC_UNKNOWN => Self::Undefined,
            // What is trapped from EL0 (system registers, FP of a kind that is off, WFx) it does not have.
            class if class < EC_FETCH_LOWER => Self::Undefined,
            EC_SOFTWARE_STEP => Self::Breakpoint,
            _ => Self::Unexpected,
        }
    }

    fn abort(esr: u64, address: u64, access: Access) -> Self {
        match esr & ISS_FAULT_STATUS {
            // Address size, translation, access flag and permission faults, at any level.
            0b00_0000..=0b00_1111 => Self::Fault { address, access },
            FAULT_EXTERNAL => Self::External { address, marked: esr & ISS_S1PTW != 0 },
            FAULT_ALIGNMENT => Self::Alignment { address },
            _ => Self::External { address, marked: false },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn trap(esr: u64) -> Trap {
        Trap::of(&UserContext { esr, far: 0x1234, pc: 0x40_0001, ..UserContext::default() })
    }

    #[test]
    fn faults_are_told_by_kind_of_access() {
        assert_eq!(trap(0x9200_0047), Trap::Fault { address: 0x1234, access: Access::Write });
        assert_eq!(trap(0x9200_0007), Trap::Fault { address: 0x1234, access: Access::Read });
        assert_eq!(trap(0x8200_000f), Trap::Fault { address: 0x1234, access: Access::Execute });
        assert_eq!(trap(0x9200_0147), Trap::Fault { address: 0x1234, access: Access::Read });
    }

    #[test]
    fn an_abort_of_el2_is_told_by_its_mark() {
        assert_eq!(trap(0x9200_0090), Trap::External { address: 0x1234, marked: true });
        assert_eq!(trap(0x9200_0010), Trap::External { address: 0x1234, marked: false });
        assert!(is_marked_external_abort(0x9600_0090));
        assert!(!is_marked_external_abort(0x9600_0087));
        assert!(!is_marked_external_abort(0x5600_0090));
    }

    #[test]
    fn system_calls_interrupts_and_the_rest() {
        assert_eq!(trap(0x5600_0000), Trap::SystemCall);
        assert_eq!(trap(0xf200_0000), Trap::Breakpoint);
        assert_eq!(trap(0x0200_0000), Trap::Undefined);
        assert_eq!(trap(0x8a00_0000), Trap::Alignment { address: 0x40_0001 });
        assert_eq!(Trap::of(&UserContext { vector: 1, ..UserContext::default() }), Trap::Interrupt);
        assert_eq!(Trap::of(&UserContext { vector: 3, ..UserContext::default() }), Trap::Unexpected);
    }
}
