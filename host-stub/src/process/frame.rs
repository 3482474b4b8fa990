//! The frame that a handler finds on its stack, as Linux on arm64 lays it out (`arch/arm64/kernel/signal.c`):
//! `siginfo`, `ucontext` with the registers and the FP/SIMD record, and a frame record for unwinders.

use alloc::vec::Vec;

use super::context::{FpState, UserContext};
use super::signal::Signal;

/// Offset of `ucontext`.
pub const UCONTEXT: u64 = 128;
/// Offset of the signal mask.
const SIGMASK: usize = UCONTEXT as usize + 40;
/// Offset of `struct sigcontext`.
const SIGCONTEXT: usize = UCONTEXT as usize + 176;
const RESERVED: usize = SIGCONTEXT + 288;
const RESERVED_SIZE: usize = 4096;
/// Bytes of `struct rt_sigframe`.
pub const SIZE: usize = RESERVED + RESERVED_SIZE;
/// Bytes with the frame record behind it.
pub const TOTAL: usize = SIZE + 16;

const FPSIMD_MAGIC: u32 = 0x4650_8001;
const FPSIMD_SIZE: u32 = 528;
const ESR_MAGIC: u32 = 0x4553_5201;
const ESR_SIZE: u32 = 16;

/// What a frame holds of a program.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Saved {
    /// Registers; `esr`, `far` and `vector` are those of the fault.
    pub context: UserContext,
    /// FP/SIMD registers.
    pub fp: FpState,
    /// Blocked signals.
    pub mask: u64,
}

/// Where the frame goes: below the stack pointer, aligned to 16 bytes.
pub fn place(sp: u64) -> Option<u64> {
    Some(sp.checked_sub(TOTAL as u64)? & !15)
}

/// Builds the frame.
pub fn build(signal: Signal, saved: &Saved) -> Vec<u8> {
    let mut bytes = alloc::vec![0u8; TOTAL];
    let mut put = |offset: usize, value: &[u8]| {
        let target = bytes.get_mut(offset..).and_then(|rest| rest.get_mut(..value.len()));
        if let Some(target) = target {
            target.copy_from_slice(value);
        }
    };
    put(0, &signal.number.to_le_bytes());
    put(8, &signal.code.to_le_bytes());
    put(16, &signal.address.to_le_bytes());

    put(SIGMASK, &saved.mask.to_le_bytes());
    put(SIGCONTEXT, &saved.context.far.to_le_bytes());
    let UserContext { x, sp, pc, pstate, .. } = saved.context;
    for (index, value) in x.into_iter().chain([sp, pc, pstate]).enumerate() {
        put(SIGCONTEXT + 8 + index * 8, &value.to_le_bytes());
    }

    put(RESERVED, &FPSIMD_MAGIC.to_le_bytes());
    put(RESERVED + 4, &FPSIMD_SIZE.to_le_bytes());
    put(RESERVED + 8, &(saved.fp.fpsr as u32).to_le_bytes());
    put(RESERVED + 12, &(saved.fp.fpcr as u32).to_le_bytes());
    for (index, value) in saved.fp.v.iter().enumerate() {
        put(RESERVED + 16 + index * 16, value);
    }
    let esr = RESERVED + FPSIMD_SIZE as usize;
    put(esr, &ESR_MAGIC.to_le_bytes());
    put(esr + 4, &ESR_SIZE.to_le_bytes());
    put(esr + 8, &saved.context.esr.to_le_bytes());
    // A record of zeros ends the list.

    put(SIZE, &x[29].to_le_bytes());
    put(SIZE + 8, &x[30].to_le_bytes());
    bytes
}

/// Reads a frame back for `rt_sigreturn`. `None` if the program changed it into what it may not be: another
/// processor state, or a list of records without the FP/SIMD one.
pub fn parse(bytes: &[u8]) -> Option<Saved> {
    let word = |offset: usize| -> Option<u64> {
        Some(u64::from_le_bytes(bytes.get(offset..)?.first_chunk::<8>().copied()?))
    };
    let half = |offset: usize| -> Option<u32> {
        Some(u32::from_le_bytes(bytes.get(offset..)?.first_chunk::<4>().copied()?))
    };
    let mut saved = Saved { mask: word(SIGMASK)?, ..Saved::default() };
    for (index, value) in saved.context.x.iter_mut().enumerate() {
        *value = word(SIGCONTEXT + 8 + index * 8)?;
    }
    saved.context.sp = word(SIGCONTEXT + 256)?;
    saved.context.pc = word(SIGCONTEXT + 264)?;
    saved.context.pstate = UserContext::sanitised_pstate(word(SIGCONTEXT + 272)?)?;

    let record = find_record(bytes, FPSIMD_MAGIC)?;
    if half(record + 4)? != FPSIMD_SIZE {
        return None;
    }
    saved.fp.fpsr = half(record + 8)?.into();
    saved.fp.fpcr = half(record + 12)?.into();
    for (index, value) in saved.fp.v.iter_mut().enumerate() {
        *value = bytes.get(record + 16 + index * 16..)?.first_chunk::<16>().copied()?;
    }
    Some(saved)
}

/// Offset of a record in the reserved area.
fn find_record(bytes: &[u8], magic: u32) -> Option<usize> {
    let mut offset = RESERVED;
    while offset < SIZE {
        let head = bytes.get(offset..)?.first_chunk::<8>()?;
        let (found, size) = head.split_at(4);
        let found = u32::from_le_bytes(found.try_into().ok()?);
        let size = u32::from_le_bytes(size.try_into().ok()?) as usize;
        if found == magic {
            return (offset + size <= SIZE).then_some(offset);
        }
        if found == 0 || size < 8 || !size.is_multiple_of(16) {
            return None;
        }
        offset = offset.checked_add(size)?;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn saved() -> Saved {
        let mut saved = Saved { mask: 0x55, ..Saved::default() };
        for (index, x) in saved.context.x.iter_mut().enumerate() {
            *x = index as u64 + 1;
        }
        saved.context.sp = 0x7000_0000;
        saved.context.pc = 0x40_1234;
        saved.context.pstate = 0x8000_0000;
        saved.fp.v[31] = [9; 16];
        saved.fp.fpcr = 1 << 22;
        saved
    }

    fn word(bytes: &[u8], offset: usize) -> u64 {
        u64::from_le_bytes(bytes[offset..offset + 8].try_into().unwrap())
    }

    #[test]
    fn the_layout_is_linuxs() {
        let mut saved = saved();
        saved.context.far = 0x1234_5678;
        saved.context.esr = 0x9200_0090;
        let bytes = build(Signal::refused(0x1234_5678), &saved);
        assert_eq!(SIZE, 4688);
        // siginfo: si_signo, si_errno, si_code, si_addr
        assert_eq!(word(&bytes, 0), 7);
        assert_eq!(word(&bytes, 8) as u32, 3);
        assert_eq!(word(&bytes, 16), 0x1234_5678);
        // uc_sigmask, then uc_mcontext: fault_address, regs, sp, pc, pstate
        assert_eq!(word(&bytes, 168), 0x55);
        assert_eq!(word(&bytes, 304), 0x1234_5678);
        assert_eq!(word(&bytes, 312), 1);
        assert_eq!(word(&bytes, 312 + 30 * 8), 31);
        assert_eq!(word(&bytes, 560), 0x7000_0000);
        assert_eq!(word(&bytes, 568), 0x40_1234);
        assert_eq!(word(&bytes, 576), 0x8000_0000);
        // __reserved: fpsimd, esr, end
        assert_eq!(word(&bytes, 592), 528 << 32 | 0x4650_8001);
        assert_eq!(bytes[592 + 16 + 31 * 16], 9);
        assert_eq!(word(&bytes, 592 + 528), 16 << 32 | 0x4553_5201);
        assert_eq!(word(&bytes, 592 + 544), 0);
        // frame record
        assert_eq!(word(&bytes, 4688), 30);
        assert_eq!(word(&bytes, 4696), 31);
    }

    #[test]
    fn a_frame_is_read_back_as_it_was_written() {
        let saved = saved();
        assert_eq!(parse(&build(Signal::refused(0), &saved)), Some(saved));
    }

    #[test]
    fn a_frame_that_asks_for_el1_is_refused() {
        let mut bytes = build(Signal::refused(0), &saved());
        bytes[576] = 5;
        assert_eq!(parse(&bytes), None);
    }

    #[test]
    fn a_frame_without_fp_record_or_with_an_endless_list_is_refused() {
        let good = build(Signal::refused(0), &saved());
        let mut bytes = good.clone();
        bytes[592] = 0;
        assert_eq!(parse(&bytes), None);
        bytes[592..600].copy_from_slice(&(1u64 | 16 << 32).to_le_bytes());
        assert_eq!(parse(&bytes), None);
        assert_eq!(parse(&good[..4000]).map(|_| ()), Some(()));
        assert_eq!(parse(&good[..700]), None);
    }

    #[test]
    fn the_frame_is_aligned_and_below_the_stack_pointer() {
        let at = place(0x7000_0008).unwrap();
        assert_eq!(at % 16, 0);
        assert!(at + TOTAL as u64 <= 0x7000_0008);
        assert_eq!(place(100), None);
    }
}
