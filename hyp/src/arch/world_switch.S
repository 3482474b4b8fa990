/*
 * Saving and loading what host and guest both use, and the way into a guest and back.
 *
 * Constants come from world_switch.rs: CONTEXT_*, EL1_*, FP_* are offsets of fields.
 */

    .arch_extension fp
    .arch_extension simd

/* The two halves of a key, by the CRm and op2 of the low one. */
    .macro  save_key crm, op2, offset
    mrs     x1, S3_0_C2_C\crm\()_\op2
    .if     \op2 == 0
    mrs     x2, S3_0_C2_C\crm\()_1
    .else
    mrs     x2, S3_0_C2_C\crm\()_3
    .endif
    stp     x1, x2, [x0, #\offset]
    .endm

    .macro  load_key crm, op2, offset
    ldp     x1, x2, [x0, #\offset]
    msr     S3_0_C2_C\crm\()_\op2, x1
    .if     \op2 == 0
    msr     S3_0_C2_C\crm\()_1, x2
    .else
    msr     S3_0_C2_C\crm\()_3, x2
    .endif
    .endm

    .macro  guest_vector kind
    .balign 0x80
    stp     x0, x1, [sp, #-16]!
    mov     x0, #\kind
    b       leave_guest
    .endm

    .macro  broken_vector number
    .balign 0x80
    msr     tpidr_el1, x0                   // Fatal: neither guest nor host runs again.
    mov     x0, #\number
    b       fatal_exception
    .endm

/*
 * void save_el1(El1 *): the registers of EL1 and EL0, all but VDISR_EL2. The virtual timer is off afterwards.
 * Each pair of fields is adjacent, which world_switch.rs asserts.
 */
    .pushsection .text.entry, "ax", %progbits
    .balign 64
    .globl  save_el1
save_el1:
    mrs     x1, sp_el0
    mrs     x2, sp_el1
    stp     x1, x2, [x0, #EL1_SP_EL0]
    mrs     x1, elr_el1
    mrs     x2, spsr_el1
    stp     x1, x2, [x0, #EL1_ELR_EL1]
    mrs     x1, sctlr_el1
    mrs     x2, tcr_el1
    stp     x1, x2, [x0, #EL1_SCTLR_EL1]
    mrs     x1, ttbr0_el1
    mrs     x2, ttbr1_el1
    stp     x1, x2, [x0, #EL1_TTBR0_EL1]
    mrs     x1, mair_el1
    mrs     x2, amair_el1
    stp     x1, x2, [x0, #EL1_MAIR_EL1]
    mrs     x1, vbar_el1
    mrs     x2, contextidr_el1
    stp     x1, x2, [x0, #EL1_VBAR_EL1]
    mrs     x1, esr_el1
    mrs     x2, far_el1
    stp     x1, x2, [x0, #EL1_ESR_EL1]
    mrs     x1, afsr0_el1
    mrs     x2, afsr1_el1
    stp     x1, x2, [x0, #EL1_AFSR0_EL1]
    mrs     x1, cpacr_el1
    mrs     x2, par_el1
    stp     x1, x2, [x0, #EL1_CPACR_EL1]
    mrs     x1, tpidr_el0
    mrs     x2, tpidrro_el0
    stp     x1, x2, [x0, #EL1_TPIDR_EL0]
    mrs     x1, tpidr_el1
    mrs     x2, csselr_el1
    stp     x1, x2, [x0, #EL1_TPIDR_EL1]
    mrs     x1, cntkctl_el1
    mrs     x2, cntv_cval_el0
    stp     x1, x2, [x0, #EL1_CNTKCTL_EL1]
    mrs     x1, cntv_ctl_el0
    mrs     x2, mdscr_el1
    stp     x1, x2, [x0, #EL1_CNTV_CTL_EL0]
    mrs     x1, vmpidr_el2
    str     x1, [x0, #EL1_VMPIDR_EL2]
    msr     cntv_ctl_el0, xzr
    ret

/*
 * void load_el1(const El1 *): the reverse, without SCTLR_EL1 and TCR_EL1. Stage 1 is held off (hold_walks),
 * stage 2 and the traps are those of the new owner already.
 */
    .balign 64
    .globl  load_el1
load_el1:
    ldp     x1, x2, [x0, #EL1_SP_EL0]
    msr     sp_el0, x1
    msr     sp_el1, x2
    ldp     x1, x2, [x0, #EL1_ELR_EL1]
    msr     elr_el1, x1
    msr     spsr_el1, x2
    ldp     x1, x2, [x0, #EL1_TTBR0_EL1]
    msr     ttbr0_el1, x1
    msr     ttbr1_el1, x2
    ldp     x1, x2, [x0, #EL1_MAIR_EL1]
    msr     mair_el1, x1
    msr     amair_el1, x2
    ldp     x1, x2, [x0, #EL1_VBAR_EL1]
    msr     vbar_el1, x1
    msr     contextidr_el1, x2
    ldp     x1, x2, [x0, #EL1_ESR_EL1]
    msr     esr_el1, x1
    msr     far_el1, x2
    ldp     x1, x2, [x0, #EL1_AFSR0_EL1]
    msr     afsr0_el1, x1
    msr     afsr1_el1, x2
    ldp     x1, x2, [x0, #EL1_CPACR_EL1]
    msr     cpacr_el1, x1
    msr     par_el1, x2
    ldp     x1, x2, [x0, #EL1_TPIDR_EL0]
    msr     tpidr_el0, x1
    msr     tpidrro_el0, x2
    ldp     x1, x2, [x0, #EL1_TPIDR_EL1]
    msr     tpidr_el1, x1
    msr     csselr_el1, x2
    ldp     x1, x2, [x0, #EL1_CNTKCTL_EL1]
    msr     cntkctl_el1, x1
    msr     cntv_cval_el0, x2
    ldp     x1, x2, [x0, #EL1_CNTV_CTL_EL0]
    msr     cntv_ctl_el0, x1
    msr     mdscr_el1, x2
    ldr     x1, [x0, #EL1_VMPIDR_EL2]
    msr     vmpidr_el2, x1
    ret

/* void save_fp(Fp *), void load_fp(const Fp *): v0 to v31, FPCR, FPSR. */
    .balign 64
    .globl  save_fp
save_fp:
    stp     q0, q1, [x0, #FP_V + 16 * 0]
    stp     q2, q3, [x0, #FP_V + 16 * 2]
    stp     q4, q5, [x0, #FP_V + 16 * 4]
    stp     q6, q7, [x0, #FP_V + 16 * 6]
    stp     q8, q9, [x0, #FP_V + 16 * 8]
    stp     q10, q11, [x0, #FP_V + 16 * 10]
    stp     q12, q13, [x0, #FP_V + 16 * 12]
    stp     q14, q15, [x0, #FP_V + 16 * 14]
    stp     q16, q17, [x0, #FP_V + 16 * 16]
    stp     q18, q19, [x0, #FP_V + 16 * 18]
    stp     q20, q21, [x0, #FP_V + 16 * 20]
    stp     q22, q23, [x0, #FP_V + 16 * 22]
    stp     q24, q25, [x0, #FP_V + 16 * 24]
    stp     q26, q27, [x0, #FP_V + 16 * 26]
    stp     q28, q29, [x0, #FP_V + 16 * 28]
    stp     q30, q31, [x0, #FP_V + 16 * 30]
    mrs     x1, fpcr
    mrs     x2, fpsr
    stp     x1, x2, [x0, #FP_FPCR]
    ret

    .balign 64
    .globl  load_fp
load_fp:
    ldp     q0, q1, [x0, #FP_V + 16 * 0]
    ldp     q2, q3, [x0, #FP_V + 16 * 2]
    ldp     q4, q5, [x0, #FP_V + 16 * 4]
    ldp     q6, q7, [x0, #FP_V + 16 * 6]
    ldp     q8, q9, [x0, #FP_V + 16 * 8]
    ldp     q10, q11, [x0, #FP_V + 16 * 10]
    ldp     q12, q13, [x0, #FP_V + 16 * 12]
    ldp     q14, q15, [x0, #FP_V + 16 * 14]
    ldp     q16, q17, [x0, #FP_V + 16 * 16]
    ldp     q18, q19, [x0, #FP_V + 16 * 18]
    ldp     q20, q21, [x0, #FP_V + 16 * 20]
    ldp     q22, q23, [x0, #FP_V + 16 * 22]
    ldp     q24, q25, [x0, #FP_V + 16 * 24]
    ldp     q26, q27, [x0, #FP_V + 16 * 26]
    ldp     q28, q29, [x0, #FP_V + 16 * 28]
    ldp     q30, q31, [x0, #FP_V + 16 * 30]
    ldp     x1, x2, [x0, #FP_FPCR]
    msr     fpcr, x1
    msr     fpsr, x2
    ret

/* void save_keys(Keys *), void load_keys(const Keys *): FEAT_PAuth only. */
    .balign 64
    .globl  save_keys
save_keys:
    save_key 1, 0, 0                        // APIAKey
    save_key 1, 2, 16                       // APIBKey
    save_key 2, 0, 32                       // APDAKey
    save_key 2, 2, 48                       // APDBKey
    save_key 3, 0, 64                       // APGAKey
    ret

    .balign 64
    .globl  load_keys
load_keys:
    load_key 1, 0, 0
    load_key 1, 2, 16
    load_key 2, 0, 32
    load_key 2, 2, 48
    load_key 3, 0, 64
    ret

/* void call_on_guest_stack(void *argument, void (*function)(void *)): calls it on this CPU's guest stack, from its top. */
    .balign 64
    .globl  call_on_guest_stack
call_on_guest_stack:
    stp     x29, x30, [sp, #-16]!
    mov     x29, sp
    adrp    x2, {stacks} + GUEST_STACKS_OFFSET + STACK_SPAN
    mrs     x3, tpidr_el2
    mov     x4, #STACK_SPAN
    madd    x2, x3, x4, x2
    mov     sp, x2
    blr     x1
    mov     sp, x29
    ldp     x29, x30, [sp], #16
    ret

/*
 * u64 enter_guest(Context *): runs the guest that is loaded until its next exception to EL2, and returns
 * which kind it was. On the stack meanwhile: the callee-saved registers and, at SAVED_CONTEXT, the argument.
 */
    .equ    SAVED_SIZE, 112
    .equ    SAVED_CONTEXT, 96

    .balign 64
    .globl  enter_guest
enter_guest:
    stp     x19, x20, [sp, #-SAVED_SIZE]!
    stp     x21, x22, [sp, #16]
    stp     x23, x24, [sp, #32]
    stp     x25, x26, [sp, #48]
    stp     x27, x28, [sp, #64]
    stp     x29, x30, [sp, #80]
    str     x0, [sp, #SAVED_CONTEXT]
    ldp     x1, x2, [x0, #CONTEXT_PC]
    msr     elr_el2, x1
    msr     spsr_el2, x2
    ldp     x2, x3, [x0, #CONTEXT_X + 8 * 2]
    ldp     x4, x5, [x0, #CONTEXT_X + 8 * 4]
    ldp     x6, x7, [x0, #CONTEXT_X + 8 * 6]
    ldp     x8, x9, [x0, #CONTEXT_X + 8 * 8]
    ldp     x10, x11, [x0, #CONTEXT_X + 8 * 10]
    ldp     x12, x13, [x0, #CONTEXT_X + 8 * 12]
    ldp     x14, x15, [x0, #CONTEXT_X + 8 * 14]
    ldp     x16, x17, [x0, #CONTEXT_X + 8 * 16]
    ldp     x18, x19, [x0, #CONTEXT_X + 8 * 18]
    ldp     x20, x21, [x0, #CONTEXT_X + 8 * 20]
    ldp     x22, x23, [x0, #CONTEXT_X + 8 * 22]
    ldp     x24, x25, [x0, #CONTEXT_X + 8 * 24]
    ldp     x26, x27, [x0, #CONTEXT_X + 8 * 26]
    ldp     x28, x29, [x0, #CONTEXT_X + 8 * 28]
    ldr     x30, [x0, #CONTEXT_X + 8 * 30]
    ldp     x0, x1, [x0, #CONTEXT_X]
    eret
    dsb     nsh                             // Never reached: keeps speculation from going on behind ERET.
    isb

/* Here from the vectors: the guest's x0 and x1 are on the stack, x0 is the kind of exception. */
    .balign 64
leave_guest:
    ldr     x1, [sp, #16 + SAVED_CONTEXT]
    stp     x2, x3, [x1, #CONTEXT_X + 8 * 2]
    stp     x4, x5, [x1, #CONTEXT_X + 8 * 4]
    stp     x6, x7, [x1, #CONTEXT_X + 8 * 6]
    stp     x8, x9, [x1, #CONTEXT_X + 8 * 8]
    stp     x10, x11, [x1, #CONTEXT_X + 8 * 10]
    stp     x12, x13, [x1, #CONTEXT_X + 8 * 12]
    stp     x14, x15, [x1, #CONTEXT_X + 8 * 14]
    stp     x16, x17, [x1, #CONTEXT_X + 8 * 16]
    stp     x18, x19, [x1, #CONTEXT_X + 8 * 18]
    stp     x20, x21, [x1, #CONTEXT_X + 8 * 20]
    stp     x22, x23, [x1, #CONTEXT_X + 8 * 22]
    stp     x24, x25, [x1, #CONTEXT_X + 8 * 24]
    stp     x26, x27, [x1, #CONTEXT_X + 8 * 26]
    stp     x28, x29, [x1, #CONTEXT_X + 8 * 28]
    str     x30, [x1, #CONTEXT_X + 8 * 30]
    ldp     x2, x3, [sp], #16
    stp     x2, x3, [x1, #CONTEXT_X]
    mrs     x2, elr_el2
    mrs     x3, spsr_el2
    stp     x2, x3, [x1, #CONTEXT_PC]
    adrp    x2, {panicking}
    ldr     w2, [x2, :lo12:{panicking}]
    cbnz    w2, park_cpu
    ldp     x21, x22, [sp, #16]
    ldp     x23, x24, [sp, #32]
    ldp     x25, x26, [sp, #48]
    ldp     x27, x28, [sp, #64]
    ldp     x29, x30, [sp, #80]
    ldp     x19, x20, [sp], #SAVED_SIZE
    ret
    .popsection

/*
 * EL2's vectors while a guest is loaded. An exception from EL2 itself is fatal, as under the host's vectors;
 * EL2 keeps interrupts and SErrors masked, so an SError that a guest caused and that arrives late stays
 * pending and is the host's.
 */
    .pushsection .vectors, "ax", %progbits
    .balign 2048
    .globl  guest_vectors
guest_vectors:
    broken_vector 0                         // EL2 with SP_EL0
    broken_vector 1
    broken_vector 2
    broken_vector 3
    broken_vector 4                         // EL2 with SP_EL2
    broken_vector 5
    broken_vector 6
    broken_vector 7
    guest_vector EXIT_SYNC                  // EL1 or EL0 in AArch64: synchronous, IRQ, FIQ, SError
    guest_vector EXIT_IRQ
    guest_vector EXIT_IRQ
    guest_vector EXIT_SERROR
    guest_vector EXIT_SYNC                  // EL0 in AArch32, which ends the VM
    guest_vector EXIT_IRQ
    guest_vector EXIT_IRQ
    guest_vector EXIT_SERROR
    .popsection
