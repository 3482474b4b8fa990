// Exception vectors, and the way into and out of EL0.
//
// EL1 runs with all interrupts masked: it polls the interrupt controller where it means to take a tick. So
// the only exceptions taken from EL1 are faults, and an exception from EL0 always finds the frame that
// `enter_user` left on the stack.

    .macro from_kernel kind
    .balign 128
    msr     tpidr_el1, x0
    mov     x0, sp
    tbz     x0, #{stack_shift}, stack_overflow
    mrs     x0, tpidr_el1
    sub     sp, sp, #{frame_size}
    stp     x0, x1, [sp]
    mov     x0, #\kind
    b       kernel_exit
    .endm

    .macro from_user kind
    .balign 128
    stp     x0, x1, [sp, #-16]!
    mov     x1, #\kind
    b       user_exit
    .endm

    .section .text.vectors, "ax"
    .balign 2048
    .global vectors
vectors:
    from_kernel 0
    from_kernel 1
    from_kernel 2
    from_kernel 3
    from_kernel 4
    from_kernel 5
    from_kernel 6
    from_kernel 7
    from_user 0
    from_user 1
    from_user 2
    from_user 3
    from_user 4
    from_user 5
    from_user 6
    from_user 7

    // A fault at EL1: x0 = vector, x0 and x1 saved. Builds a KernelFrame and returns if it was expected.
kernel_exit:
    stp     x2, x3, [sp, #16]
    stp     x4, x5, [sp, #32]
    stp     x6, x7, [sp, #48]
    stp     x8, x9, [sp, #64]
    stp     x10, x11, [sp, #80]
    stp     x12, x13, [sp, #96]
    stp     x14, x15, [sp, #112]
    stp     x16, x17, [sp, #128]
    stp     x18, x19, [sp, #144]
    stp     x20, x21, [sp, #160]
    stp     x22, x23, [sp, #176]
    stp     x24, x25, [sp, #192]
    stp     x26, x27, [sp, #208]
    stp     x28, x29, [sp, #224]
    add     x1, sp, #{frame_size}
    stp     x30, x1, [sp, #240]
    mrs     x1, elr_el1
    mrs     x2, spsr_el1
    stp     x1, x2, [sp, #256]
    mrs     x1, esr_el1
    mrs     x2, far_el1
    stp     x1, x2, [sp, #272]
    mov     x1, sp
    bl      kernel_exception
    ldp     x1, x2, [sp, #256]
    msr     elr_el1, x1
    msr     spsr_el1, x2
    ldp     x2, x3, [sp, #16]
    ldp     x4, x5, [sp, #32]
    ldp     x6, x7, [sp, #48]
    ldp     x8, x9, [sp, #64]
    ldp     x10, x11, [sp, #80]
    ldp     x12, x13, [sp, #96]
    ldp     x14, x15, [sp, #112]
    ldp     x16, x17, [sp, #128]
    ldp     x18, x19, [sp, #144]
    ldp     x20, x21, [sp, #160]
    ldp     x22, x23, [sp, #176]
    ldp     x24, x25, [sp, #192]
    ldp     x26, x27, [sp, #208]
    ldp     x28, x29, [sp, #224]
    ldr     x30, [sp, #240]
    ldp     x0, x1, [sp]
    add     sp, sp, #{frame_size}
    eret

stack_overflow:
    adrp    x0, _end_of_emergency_stack
    mov     sp, x0
    mrs     x0, elr_el1
    mrs     x1, esr_el1
    mrs     x2, far_el1
    bl      kernel_stack_overflow
1:  wfe
    b       1b

    // void enter_user(UserContext *): runs EL0 until its next exception, which is then in the context.
    .global enter_user
enter_user:
    stp     x29, x30, [sp, #-112]!
    stp     x27, x28, [sp, #16]
    stp     x25, x26, [sp, #32]
    stp     x23, x24, [sp, #48]
    stp     x21, x22, [sp, #64]
    stp     x19, x20, [sp, #80]
    str     x0, [sp, #96]
    ldp     x1, x2, [x0, #248]
    msr     sp_el0, x1
    msr     elr_el1, x2
    ldr     x1, [x0, #264]
    msr     spsr_el1, x1
    ldr     x1, [x0, #296]
    msr     tpidr_el0, x1
    ldp     x2, x3, [x0, #16]
    ldp     x4, x5, [x0, #32]
    ldp     x6, x7, [x0, #48]
    ldp     x8, x9, [x0, #64]
    ldp     x10, x11, [x0, #80]
    ldp     x12, x13, [x0, #96]
    ldp     x14, x15, [x0, #112]
    ldp     x16, x17, [x0, #128]
    ldp     x18, x19, [x0, #144]
    ldp     x20, x21, [x0, #160]
    ldp     x22, x23, [x0, #176]
    ldp     x24, x25, [x0, #192]
    ldp     x26, x27, [x0, #208]
    ldp     x28, x29, [x0, #224]
    ldr     x30, [x0, #240]
    ldp     x0, x1, [x0]
    eret
    dsb     nsh
    isb

    // x0 and x1 of EL0 are on the stack, x1 = vector.
user_exit:
    ldr     x0, [sp, #(16 + 96)]
    stp     x2, x3, [x0, #16]
    stp     x4, x5, [x0, #32]
    stp     x6, x7, [x0, #48]
    stp     x8, x9, [x0, #64]
    stp     x10, x11, [x0, #80]
    stp     x12, x13, [x0, #96]
    stp     x14, x15, [x0, #112]
    stp     x16, x17, [x0, #128]
    stp     x18, x19, [x0, #144]
    stp     x20, x21, [x0, #160]
    stp     x22, x23, [x0, #176]
    stp     x24, x25, [x0, #192]
    stp     x26, x27, [x0, #208]
    stp     x28, x29, [x0, #224]
    str     x30, [x0, #240]
    ldp     x2, x3, [sp], #16
    stp     x2, x3, [x0]
    mrs     x2, sp_el0
    mrs     x3, elr_el1
    stp     x2, x3, [x0, #248]
    mrs     x2, spsr_el1
    mrs     x3, esr_el1
    stp     x2, x3, [x0, #264]
    mrs     x2, far_el1
    stp     x2, x1, [x0, #280]
    mrs     x2, tpidr_el0
    str     x2, [x0, #296]
    ldp     x19, x20, [sp, #80]
    ldp     x21, x22, [sp, #64]
    ldp     x23, x24, [sp, #48]
    ldp     x25, x26, [sp, #32]
    ldp     x27, x28, [sp, #16]
    ldp     x29, x30, [sp], #112
    ret

    // Accesses that may be refused by EL2. Each faulting instruction is paired in .fixups with where to go
    // on; the fault handler leaves ESR in x1 and FAR in x2 there.
    .macro expected from, to
    .pushsection .fixups, "a"
    .balign 8
    .quad   \from, \to
    .popsection
    .endm

    // (value, esr, far) probe_load(address)
    .global probe_load
probe_load:
    mov     x1, xzr
    mov     x2, xzr
1:  ldr     x0, [x0]
2:  ret
    expected 1b, 2b

    // (_, esr, far) probe_store(address, value)
    .global probe_store
probe_store:
    mov     x3, x1
    mov     x1, xzr
    mov     x2, xzr
1:  str     x3, [x0]
    dsb     sy                              // so that an asynchronous report comes here, too
2:  ret
    expected 1b, 2b

    // (_, esr, far) probe_copy(to, from, bytes)
    .global probe_copy
probe_copy:
    mov     x3, x1
    mov     x4, x2
    mov     x1, xzr
    mov     x2, xzr
    orr     x5, x0, x3
    tst     x5, #7
    b.ne    3f
1:  cmp     x4, #8
    b.lo    3f
10: ldr     x5, [x3], #8
11: str     x5, [x0], #8
    sub     x4, x4, #8
    b       1b
3:  cbz     x4, 4f
12: ldrb    w5, [x3], #1
13: strb    w5, [x0], #1
    sub     x4, x4, #1
    b       3b
4:  ret
    expected 10b, 4b
    expected 11b, 4b
    expected 12b, 4b
    expected 13b, 4b

    // (_, esr, far) probe_zero(page)
    .global probe_zero
probe_zero:
    mov     x1, xzr
    mov     x2, xzr
    mov     x3, #256
1:  stp     xzr, xzr, [x0], #16
    subs    x3, x3, #1
    b.ne    1b
2:  ret
    expected 1b, 2b

    // FP/SIMD state of EL0, which the kernel never touches: 32 registers, then FPSR and FPCR.
    .arch_extension fp
    .arch_extension simd
    .global save_fp
save_fp:
    stp     q0, q1, [x0]
    stp     q2, q3, [x0, #32]
    stp     q4, q5, [x0, #64]
    stp     q6, q7, [x0, #96]
    stp     q8, q9, [x0, #128]
    stp     q10, q11, [x0, #160]
    stp     q12, q13, [x0, #192]
    stp     q14, q15, [x0, #224]
    stp     q16, q17, [x0, #256]
    stp     q18, q19, [x0, #288]
    stp     q20, q21, [x0, #320]
    stp     q22, q23, [x0, #352]
    stp     q24, q25, [x0, #384]
    stp     q26, q27, [x0, #416]
    stp     q28, q29, [x0, #448]
    stp     q30, q31, [x0, #480]
    mrs     x1, fpsr
    mrs     x2, fpcr
    str     x1, [x0, #512]
    str     x2, [x0, #520]
    ret

    .global restore_fp
restore_fp:
    ldp     q0, q1, [x0]
    ldp     q2, q3, [x0, #32]
    ldp     q4, q5, [x0, #64]
    ldp     q6, q7, [x0, #96]
    ldp     q8, q9, [x0, #128]
    ldp     q10, q11, [x0, #160]
    ldp     q12, q13, [x0, #192]
    ldp     q14, q15, [x0, #224]
    ldp     q16, q17, [x0, #256]
    ldp     q18, q19, [x0, #288]
    ldp     q20, q21, [x0, #320]
    ldp     q22, q23, [x0, #352]
    ldp     q24, q25, [x0, #384]
    ldp     q26, q27, [x0, #416]
    ldp     q28, q29, [x0, #448]
    ldp     q30, q31, [x0, #480]
    ldr     x1, [x0, #512]
    ldr     x2, [x0, #520]
    msr     fpsr, x1
    msr     fpcr, x2
    ret
