// Entry of a program, and accesses that survive a signal.

    .section .text.start, "ax"
    .global _start
_start:
    mov     x29, xzr
    mov     x30, xzr
    mov     x0, sp
    adrp    x9, deed_probe_context
    add     x9, x9, :lo12:deed_probe_context
    msr     tpidr_el0, x9
    b       deed_program_start

// i64 deed_spawn(u64 flags, u64 stack, u64 *id, ProbeContext *context, u64 *end): `clone`. The new thread calls the
// function at the top of its stack with the word above it, and ends when that returns.
    .global deed_spawn
deed_spawn:
    mov     x8, #{clone}
    svc     #0
    cbz     x0, 1f
    ret
1:  mov     x29, xzr
    mov     x30, xzr
    ldp     x1, x0, [sp]
    blr     x1
    mov     x0, #0
    mov     x8, #{exit}
    svc     #0
    brk     #0

// u64 deed_probe_load(u64 address, u64 *value): 0, or the signal that the load raised.
    .global deed_probe_load
deed_probe_load:
    mrs     x9, tpidr_el0
    stp     x19, x20, [x9, #{saved}]
    stp     x21, x22, [x9, #{saved} + 16]
    stp     x23, x24, [x9, #{saved} + 32]
    stp     x25, x26, [x9, #{saved} + 48]
    stp     x27, x28, [x9, #{saved} + 64]
    stp     x29, x30, [x9, #{saved} + 80]
    mov     x10, sp
    mov     x11, #1
    stp     x10, x11, [x9, #{saved} + 96]   // sp, armed
    ldr     x10, [x0]
    str     xzr, [x9, #{armed}]
    str     x10, [x1]
    mov     x0, #0
    ret

// u64 deed_probe_store(u64 address, u64 value): 0, or the signal that the store raised.
    .global deed_probe_store
deed_probe_store:
    mrs     x9, tpidr_el0
    stp     x19, x20, [x9, #{saved}]
    stp     x21, x22, [x9, #{saved} + 16]
    stp     x23, x24, [x9, #{saved} + 32]
    stp     x25, x26, [x9, #{saved} + 48]
    stp     x27, x28, [x9, #{saved} + 64]
    stp     x29, x30, [x9, #{saved} + 80]
    mov     x10, sp
    mov     x11, #1
    stp     x10, x11, [x9, #{saved} + 96]
    str     x1, [x0]
    str     xzr, [x9, #{armed}]
    mov     x0, #0
    ret

// The handler of a signal that only interrupts a system call.
    .global deed_signal_nothing
deed_signal_nothing:
    ret

// The handler of SIGBUS and SIGSEGV (x0 = signal, x1 = siginfo): ends the probe that was under way, as
// siglongjmp would: the saved registers come back and the signal is unblocked.
    .global deed_signal_handler
deed_signal_handler:
    mrs     x9, tpidr_el0
    ldr     x10, [x9, #{armed}]
    cbz     x10, deed_signal_unexpected
    str     xzr, [x9, #{armed}]
    ldr     w10, [x1, #8]                   // si_code
    ldr     x11, [x1, #16]                  // si_addr
    stp     x10, x11, [x9, #{code}]
    ldp     x19, x20, [x9, #{saved}]
    ldp     x21, x22, [x9, #{saved} + 16]
    ldp     x23, x24, [x9, #{saved} + 32]
    ldp     x25, x26, [x9, #{saved} + 48]
    ldp     x27, x28, [x9, #{saved} + 64]
    ldp     x29, x30, [x9, #{saved} + 80]
    ldr     x10, [x9, #{saved} + 96]
    mov     sp, x10
    mov     x12, x0
    mov     x13, #1
    lsl     x13, x13, x12
    lsr     x13, x13, #1                    // the signal's bit in a mask
    str     x13, [x9, #{mask}]
    mov     x0, #1                          // SIG_UNBLOCK
    add     x1, x9, #{mask}
    mov     x2, xzr
    mov     x3, #8
    mov     x8, #{sigprocmask}
    svc     #0
    mov     x0, x12
    ret

    .global deed_signal_restorer
deed_signal_restorer:
    mov     x8, #{sigreturn}
    svc     #0
    brk     #0

    .section .bss.probe, "aw", @nobits
    .balign 16
    .global deed_probe_context
deed_probe_context:
    .skip   {context_size}
