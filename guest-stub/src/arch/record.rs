//! The entry record: every register as the boot vCPU found it at its first instruction.

use core::arch::global_asm;

macro_rules! system_registers {
    ($($name:literal),* $(,)?) => {
        /// Names of the recorded system registers, in the order of [`EntryRecord::system`].
        pub const SYSTEM_REGISTERS: &[&str] = &[$($name),*];

        // Writes the registers to x0 onwards and leaves x0 behind the last; uses x1.
        global_asm!(
            ".section .text.record, \"ax\"",
            ".global deed_guest_record_system_registers",
            "deed_guest_record_system_registers:",
            $(concat!("mrs x1, ", $name), "str x1, [x0], #8",)*
            "ret",
        );
    };
}

system_registers!(
    "sctlr_el1",
    "actlr_el1",
    "cpacr_el1",
    "ttbr0_el1",
    "ttbr1_el1",
    "tcr_el1",
    "esr_el1",
    "afsr0_el1",
    "afsr1_el1",
    "far_el1",
    "mair_el1",
    "vbar_el1",
    "contextidr_el1",
    "amair_el1",
    "cntkctl_el1",
    "par_el1",
    "tpidr_el1",
    "tpidr_el0",
    "tpidrro_el0",
    "sp_el0",
    "elr_el1",
    "spsr_el1",
    "csselr_el1",
    "cntv_ctl_el0",
    "cntv_cval_el0",
);

/// Number of recorded system registers.
pub const SYSTEM_COUNT: usize = 25;
const _: () = assert!(SYSTEM_REGISTERS.len() == SYSTEM_COUNT);

/// Every register at the guest's first instruction; layout known to entry.S.
#[repr(C, align(16))]
#[derive(Debug)]
pub struct EntryRecord {
    /// x0 to x30.
    pub general: [u64; 31],
    /// See [`SYSTEM_REGISTERS`].
    pub system: [u64; SYSTEM_COUNT],
    /// v0 to v31, low half first.
    pub vector: [[u64; 2]; 32],
    /// FPCR and FPSR.
    pub floating: [u64; 2],
}
const _: () = assert!(core::mem::offset_of!(EntryRecord, vector).is_multiple_of(16));

unsafe extern "C" {
    static deed_guest_entry_record: EntryRecord;
    fn deed_guest_record_system_registers(buffer: *mut [u64; SYSTEM_COUNT]);
}

/// The record of this boot.
pub fn entry_record() -> &'static EntryRecord {
    // SAFETY: entry.S reserves the record with this size and alignment, writes it before any Rust code runs,
    // and nothing writes it later.
    unsafe { &deed_guest_entry_record }
}

/// The recorded system registers as they are now.
pub fn system_registers() -> [u64; SYSTEM_COUNT] {
    let mut buffer = [0; SYSTEM_COUNT];
    // SAFETY: the function writes SYSTEM_COUNT words to the buffer and clobbers x0 and x1 only.
    unsafe { deed_guest_record_system_registers(&mut buffer) };
    buffer
}
