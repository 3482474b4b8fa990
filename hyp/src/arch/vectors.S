/*
 * EL2's vectors while the host runs (a guest runs under the world switch's own).
 *
 * Only synchronous exceptions of the host come here in order. A call (HVC or SMC from AArch64) takes the lean
 * path, which saves what the calling convention lets a function clobber; everything else saves x0 to x30.
 * Any exception from EL2 itself, and any interrupt taken to EL2 while the host runs, is fatal: it is reported
 * on a stack of its own. An SError that comes to EL2 is the host's and goes back to it.
 *
 * Constants come from exceptions.rs: FRAME_SIZE, FRAME_X0, FATAL_*, EC_*.
 */

    .macro fatal_vector kind
    .balign 0x80
    msr     tpidr_el1, x0                   // Fatal: the host never runs again, its registers are free.
    mov     x0, #\kind
    b       fatal_exception
    .endm

    .pushsection .vectors, "ax", %progbits
    .balign 2048
    .globl  host_vectors
host_vectors:
    fatal_vector 0                          // EL2 with SP_EL0: synchronous, IRQ, FIQ, SError
    fatal_vector 1
    fatal_vector 2
    fatal_vector 3
    fatal_vector 4                          // EL2 with SP_EL2
    fatal_vector 5
    fatal_vector 6
    fatal_vector 7
    .balign 0x80                            // EL1 or EL0 in AArch64: synchronous
    b       host_synchronous
    fatal_vector 9
    fatal_vector 10
    .balign 0x80
    b       host_serror_entry
    .balign 0x80                            // EL0 in AArch32: synchronous
    b       host_synchronous
    fatal_vector 13
    fatal_vector 14
    .balign 0x80
    b       host_serror_entry
    .popsection

    .macro  save_host
    sub     sp, sp, #FRAME_SIZE
    stp     x0, x1, [sp, #8 * 0]
    stp     x2, x3, [sp, #8 * 2]
    stp     x4, x5, [sp, #8 * 4]
    stp     x6, x7, [sp, #8 * 6]
    stp     x8, x9, [sp, #8 * 8]
    stp     x10, x11, [sp, #8 * 10]
    stp     x12, x13, [sp, #8 * 12]
    stp     x14, x15, [sp, #8 * 14]
    stp     x16, x17, [sp, #8 * 16]
    str     x18, [sp, #8 * 18]
    str     x30, [sp, #8 * 30]
    adrp    x2, {panicking}
    ldr     w2, [x2, :lo12:{panicking}]
    cbnz    w2, park_cpu
    .endm

/* A physical SError is routed to EL2 while a virtual one is pending for the host: it joins that one. */
    .pushsection .text.entry, "ax", %progbits
    .balign 64
host_serror_entry:
    save_host
    mrs     x0, esr_el2
    bl      {host_serror}
    b       return_to_host

    .balign 64
host_synchronous:
    save_host
    mrs     x1, esr_el2
    ubfx    x2, x1, #ESR_EC_SHIFT, #6
    mov     x0, sp
    cmp     x2, #EC_HVC64
    b.ne    1f
    bl      {host_hvc}
return_to_host:
    ldp     x0, x1, [sp, #8 * 0]
    ldp     x2, x3, [sp, #8 * 2]
    ldp     x4, x5, [sp, #8 * 4]
    ldp     x6, x7, [sp, #8 * 6]
    ldp     x8, x9, [sp, #8 * 8]
    ldp     x10, x11, [sp, #8 * 10]
    ldp     x12, x13, [sp, #8 * 12]
    ldp     x14, x15, [sp, #8 * 14]
    ldp     x16, x17, [sp, #8 * 16]
    ldr     x18, [sp, #8 * 18]
    ldr     x30, [sp, #8 * 30]
    add     sp, sp, #FRAME_SIZE
    eret
    dsb     nsh                             // Never reached: keeps speculation from going on behind ERET.
    isb

1:  cmp     x2, #EC_SMC64
    b.ne    2f
    bl      {host_smc}
    b       return_to_host
2:  stp     x19, x20, [sp, #8 * 19]
    stp     x21, x22, [sp, #8 * 21]
    stp     x23, x24, [sp, #8 * 23]
    stp     x25, x26, [sp, #8 * 25]
    stp     x27, x28, [sp, #8 * 27]
    str     x29, [sp, #8 * 29]
    bl      {host_trap}
    ldp     x19, x20, [sp, #8 * 19]
    ldp     x21, x22, [sp, #8 * 21]
    ldp     x23, x24, [sp, #8 * 23]
    ldp     x25, x26, [sp, #8 * 25]
    ldp     x27, x28, [sp, #8 * 27]
    ldr     x29, [sp, #8 * 29]
    b       return_to_host

/*
 * Reports a fatal exception. x0 = which vector; the x0 of the exception is in TPIDR_EL1. The first CPU to
 * come here takes the emergency stack, others park.
 */
    .globl  fatal_exception
fatal_exception:
    msr     tpidr_el0, x1
    msr     tpidrro_el0, x2
    msr     far_el1, x3
    adrp    x1, {fatal}
    add     x1, x1, :lo12:{fatal}
1:  ldaxr   w2, [x1]
    cbnz    w2, park_cpu
    mov     w2, #1
    stlxr   w3, w2, [x1]
    cbnz    w3, 1b
    adrp    x1, {emergency_stack}
    add     x1, x1, :lo12:{emergency_stack}
    add     x1, x1, #EMERGENCY_STACK_SIZE
    sub     x1, x1, #FATAL_FRAME_SIZE
    mov     x2, sp
    mov     sp, x1
    str     x2, [sp, #8 * 31]
    str     x0, [sp, #8 * 32]
    mrs     x0, tpidr_el1
    mrs     x1, tpidr_el0
    mrs     x2, tpidrro_el0
    mrs     x3, far_el1
    stp     x0, x1, [sp, #8 * 0]
    stp     x2, x3, [sp, #8 * 2]
    stp     x4, x5, [sp, #8 * 4]
    stp     x6, x7, [sp, #8 * 6]
    stp     x8, x9, [sp, #8 * 8]
    stp     x10, x11, [sp, #8 * 10]
    stp     x12, x13, [sp, #8 * 12]
    stp     x14, x15, [sp, #8 * 14]
    stp     x16, x17, [sp, #8 * 16]
    stp     x18, x19, [sp, #8 * 18]
    stp     x20, x21, [sp, #8 * 20]
    stp     x22, x23, [sp, #8 * 22]
    stp     x24, x25, [sp, #8 * 24]
    stp     x26, x27, [sp, #8 * 26]
    stp     x28, x29, [sp, #8 * 28]
    str     x30, [sp, #8 * 30]
    mov     x0, sp
    bl      {report_fatal}

    .globl  park_cpu
park_cpu:
    wfe
    b       park_cpu

/*
 * void enter_host(u64 entry, u64 argument, u64 spsr): leaves EL2 for the host's first instruction. No register
 * keeps a value of EL2's. The stack is empty from here on: the next exception starts at its top.
 */
    .globl  enter_host
enter_host:
    msr     elr_el2, x0
    msr     spsr_el2, x2
    mov     x0, x1
    adrp    x1, {stacks} + HOST_STACK_SPAN
    mrs     x2, tpidr_el2
    mov     x3, #HOST_STACK_SPAN
    madd    x1, x2, x3, x1
    mov     sp, x1
    .irp    n, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30
    mov     x\n, xzr
    .endr
    eret
    dsb     nsh
    isb
    .popsection
