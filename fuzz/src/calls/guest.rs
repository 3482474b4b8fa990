//! What a guest does when it is run.

use super::{COUNTS, GFNS, SECRET, SMALL};
use crate::input::Input;
use crate::machine::Turn;
use abi::{guest, psci};
use hyp::vm::context::{Trap, pstate};

const GUEST_CALLS: [u32; 16] = [
    guest::MEM_SHARE,
    guest::MEM_SHARE,
    guest::MEM_UNSHARE,
    guest::MEM_UNSHARE,
    guest::MEM_RELINQUISH,
    guest::MMIO_GUARD_MAP,
    guest::MMIO_GUARD_UNMAP,
    guest::MMIO_GUARD_ENROLL,
    guest::PTP,
    guest::HYP_MEMINFO,
    psci::CPU_ON,
    psci::CPU_OFF,
    psci::CPU_SUSPEND,
    psci::AFFINITY_INFO,
    psci::SYSTEM_OFF,
    psci::SYSTEM_RESET2,
];

/// The exception class of a trap, for the outcomes.
pub(super) fn trap_class(trap: Trap) -> u64 {
    match trap {
        Trap::Sync { esr, .. } => esr >> 26 & 0x3f,
        Trap::Irq => 0x40,
        Trap::SError { .. } => 0x41,
        Trap::Retry => 0x42,
    }
}

/// What a guest does.
pub(super) fn turn(input: &mut Input<'_>) -> Turn {
    const HVC: u64 = 0x16 << 26 | 1 << 25;
    let mut turn = Turn { x: [0; 7], secret: SECRET, pstate: None, trap: Trap::Irq };
    match input.byte() % 8 {
        0..=3 => {
            turn.x[0] = GUEST_CALLS[usize::from(input.byte()) % GUEST_CALLS.len()].into();
            turn.x[1] = match turn.x[0] >> 24 {
                0xc6 => input.pick(&GFNS) << 12,
                _ => input.pick(&SMALL),
            };
            turn.x[2] = input.pick(&COUNTS);
            turn.trap = Trap::Sync { esr: HVC, far: 0, hpfar: 0 };
        }
        4 => {
            // An access that stage 2 refuses.
            let iss = u64::from(u32::from_le_bytes(input.bytes())) & 0x1ff_ffff;
            let class = if input.byte() & 3 == 0 { 0x20 } else { 0x24 };
            let gfn = input.pick(&GFNS) & ((1 << 28) - 1);
            let fault =
                iss & !0x3f | [0b00_0111, 0b00_0110, 0b00_1111, 0b00_0100][usize::from(input.byte() & 3)];
            let far = u64::from(input.byte()) << 4;
            turn.trap = Trap::Sync { esr: class << 26 | 1 << 25 | fault, far, hpfar: gfn << 4 };
        }
        5 => {
            let [esr, far, hpfar] = input.words();
            turn.x = input.words();
            turn.trap = Trap::Sync { esr: esr & u64::from(u32::MAX), far, hpfar };
        }
        6 => {
            let class = u64::from(input.byte() & 0x3f);
            let iss = u64::from(u32::from_le_bytes(input.bytes())) & 0x1ff_ffff;
            turn.trap = Trap::Sync { esr: class << 26 | 1 << 25 | iss, far: 0, hpfar: 0 };
        }
        _ => {
            let how = input.byte();
            turn.trap = [Trap::Irq, Trap::SError { esr: 0xbe00_0000 }, Trap::Retry][usize::from(how % 3)];
            if how & 0x80 != 0 {
                turn.pstate = Some(pstate::AARCH32 | pstate::EL0T);
            }
        }
    }
    turn
}
