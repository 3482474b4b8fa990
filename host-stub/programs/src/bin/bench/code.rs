//! A few instructions that a bare guest runs for ever: no stack, no MMU, x19 the only state.

use core::arch::global_asm;

use abi::guest;

global_asm!(
    ".section .rodata.bench_code, \"a\"",
    // A wait that traps.
    "bench_wait: wfi",
    "    b       bench_wait",
    // A call that EL2 hands to the host.
    "bench_forward:",
    "    mov     w0, #{ptp_low}",
    "    movk    w0, #{ptp_high}, lsl #16",
    "    hvc     #0",
    "    b       bench_forward",
    // Stores to a device, which x0 gives.
    "bench_device:",
    "    mov     x19, x0",
    "    mov     w0, #{enroll_low}",
    "    movk    w0, #{enroll_high}, lsl #16",
    "    hvc     #0",
    "    mov     w0, #{map_low}",
    "    movk    w0, #{map_high}, lsl #16",
    "    mov     x1, x19",
    "    mov     x2, #1",
    "    mov     x3, #0",
    "    hvc     #0",
    "3:  str     xzr, [x19]",
    "    b       3b",
    // Stores to page after page, from the one in x0 on.
    "bench_touch:",
    "    str     xzr, [x0]",
    "    add     x0, x0, #4096",
    "    b       bench_touch",
    // Shares page after page.
    "bench_share:",
    "    mov     x19, x0",
    "4:  mov     w0, #{share_low}",
    "    movk    w0, #{share_high}, lsl #16",
    "    mov     x1, x19",
    "    mov     x2, #1",
    "    mov     x3, #0",
    "    hvc     #0",
    "    add     x19, x19, #4096",
    "    b       4b",
    // Shares and unshares the page in x0, with a wait after each.
    "bench_unshare:",
    "    mov     x19, x0",
    "5:  mov     w0, #{share_low}",
    "    movk    w0, #{share_high}, lsl #16",
    "    mov     x1, x19",
    "    mov     x2, #1",
    "    mov     x3, #0",
    "    hvc     #0",
    "    wfi",
    "    mov     w0, #{unshare_low}",
    "    movk    w0, #{unshare_high}, lsl #16",
    "    mov     x1, x19",
    "    mov     x2, #1",
    "    mov     x3, #0",
    "    hvc     #0",
    "    wfi",
    "    b       5b",
    "bench_code_end:",
    ".text",
    ptp_low = const guest::PTP & 0xffff,
    ptp_high = const guest::PTP >> 16,
    enroll_low = const guest::MMIO_GUARD_ENROLL & 0xffff,
    enroll_high = const guest::MMIO_GUARD_ENROLL >> 16,
    map_low = const guest::MMIO_GUARD_MAP & 0xffff,
    map_high = const guest::MMIO_GUARD_MAP >> 16,
    share_low = const guest::MEM_SHARE & 0xffff,
    share_high = const guest::MEM_SHARE >> 16,
    unshare_low = const guest::MEM_UNSHARE & 0xffff,
    unshare_high = const guest::MEM_UNSHARE >> 16,
);

unsafe extern "C" {
    static bench_wait: u8;
    static bench_forward: u8;
    static bench_device: u8;
    static bench_touch: u8;
    static bench_share: u8;
    static bench_unshare: u8;
    static bench_code_end: u8;
}

/// What the guest does.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Code {
    /// Waits.
    Wait,
    /// Makes a call that the host serves.
    Forward,
    /// Stores to a device.
    Device,
    /// Touches page after page.
    Touch,
    /// Shares page after page.
    Share,
    /// Shares a page and unshares it.
    Unshare,
}

impl Code {
    fn start(self) -> *const u8 {
        match self {
            Self::Wait => &raw const bench_wait,
            Self::Forward => &raw const bench_forward,
            Self::Device => &raw const bench_device,
            Self::Touch => &raw const bench_touch,
            Self::Share => &raw const bench_share,
            Self::Unshare => &raw const bench_unshare,
        }
    }

    /// Its instructions, and those that happen to follow, in words of two.
    pub(crate) fn words(self) -> impl Iterator<Item = u64> {
        let start = self.start();
        let length = (&raw const bench_code_end as usize).saturating_sub(start as usize);
        // SAFETY: the bytes from any of the labels to the last one are constants of this program.
        let bytes = unsafe { core::slice::from_raw_parts(start, length) };
        bytes.chunks(8).map(|bytes| bytes.iter().rev().fold(0, |word, byte| word << 8 | u64::from(*byte)))
    }
}
