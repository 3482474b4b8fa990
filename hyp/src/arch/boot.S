/*
 * From the boot loader to Rust, on the boot CPU: EL2, MMU off, x0 = device tree. From the firmware to Rust on the others:
 * `secondary_entry`.
 *
 * Constants come from boot.rs. Until the MMU and the caches are on there are no exclusives, no unaligned
 * accesses, and no code that needs a relocation that has not been applied.
 */

/*
 * Makes of the CPU's state what the code below counts on: MMU and caches off, E2H clear. E2H first: it changes what other
 * registers mean (Arm ARM, HCR_EL2). The host is AArch64. Changes x1.
 */
    .macro  known_regime
    mov     x1, #HCR_RW
    msr     hcr_el2, x1
    isb
    movz    x1, #SCTLR_OFF & 0xffff
    movk    x1, #SCTLR_OFF >> 16, lsl #16
    msr     sctlr_el2, x1
    isb
    .endm

    .pushsection .head, "ax", %progbits

/* The header of an arm64 Linux image (Documentation/arch/arm64/booting.rst). */
    .globl  image_header
image_header:
    b       primary_entry
    .long   0
    .quad   0                               // text_offset
    .quad   __image_end - image_header      // image_size: covers .bss, stacks and pools
    .quad   0xa                             // flags: little-endian, 4 KiB pages, anywhere in memory
    .quad   0
    .quad   0
    .quad   0
    .ascii  "ARM\x64"
    .long   0

primary_entry:
    mrs     x1, CurrentEL
    cmp     x1, #CURRENT_EL_2
    b.ne    park                            // Not entered at EL2: nothing that Deed could promise.
    msr     daifset, #0xf
    mov     x19, x0

    adr     x20, image_header
    tst     x20, #IMAGE_ALIGNMENT - 1
    b.ne    park                            // ADRP below counts on it, as does the header's promise.

    known_regime

    // What is written below with the MMU off goes past the caches: no dirty line may follow it to memory.
    adrp    x0, __rodata_start
    adrp    x1, __pool_start
    bl      clean_and_invalidate

    // Relocate: add to each address in data how far the image is from where it was linked for.
    movz    x2, #LINK_BASE & 0xffff
    movk    x2, #LINK_BASE >> 16, lsl #16
    sub     x2, x20, x2
    adrp    x0, __rela_start
    add     x0, x0, :lo12:__rela_start
    adrp    x1, __rela_end
    add     x1, x1, :lo12:__rela_end
1:  cmp     x0, x1
    b.hs    2f
    ldp     x3, x4, [x0], #16               // r_offset, r_info
    ldr     x5, [x0], #8                    // r_addend
    cmp     x4, #R_AARCH64_RELATIVE
    b.ne    park                            // The linker made a relocation that this loop does not know.
    add     x3, x3, x2
    add     x5, x5, x2
    str     x5, [x3]
    b       1b

2:  adrp    x0, __bss_start
    add     x0, x0, :lo12:__bss_start
    adrp    x1, __bss_end
3:  cmp     x0, x1
    b.hs    4f
    stp     xzr, xzr, [x0], #16
    b       3b

    // Until the final tables unmap the guard pages, the stacks of all CPUs are one: building the hypervisor
    // takes more than one of them.
4:  msr     spsel, #1
    adrp    x0, {stacks} + STACKS_SIZE
    mov     sp, x0
    msr     tpidr_el2, xzr                  // This is CPU 0.
    adrp    x0, {vectors}
    add     x0, x0, :lo12:{vectors}
    msr     vbar_el2, x0

    // Fills the early tables and sets MAIR_EL2, TCR_EL2 and TTBR0_EL2.
    mov     x0, x19
    bl      {early_map}

    // Whatever the caches hold of it is older than what has just been written.
    dsb     sy
    adrp    x0, __rodata_start
    adrp    x1, __pool_start
    bl      clean_and_invalidate
    ic      iallu
    tlbi    alle1
    tlbi    alle2
    dsb     sy
    isb

    mrs     x1, sctlr_el2
    mov     x2, #SCTLR_EARLY
    orr     x1, x1, x2
    msr     sctlr_el2, x1
    isb

    mov     x0, x19
    bl      {build}                         // Returns the host's entry and device tree.

    adrp    x2, {stacks} + STACK_SPAN
    mov     sp, x2
    b       {finish}

/*
 * Where the firmware starts another CPU: EL2, MMU off, x0 = its index, as Deed has told the firmware. It needs no early
 * tables: the final ones map this code, and the two words that say where they are have been cleaned to memory.
 */
    .globl  secondary_entry
secondary_entry:
    mrs     x1, CurrentEL
    cmp     x1, #CURRENT_EL_2
    b.ne    park
    msr     daifset, #0xf
    known_regime

    msr     tpidr_el2, x0
    msr     spsel, #1
    adrp    x1, {stacks} + STACK_SPAN
    mov     x2, #STACK_SPAN
    madd    x1, x0, x2, x1
    mov     sp, x1
    adrp    x1, {vectors}
    add     x1, x1, :lo12:{vectors}
    msr     vbar_el2, x1

    adrp    x1, {translation}
    add     x1, x1, :lo12:{translation}
    ldp     x2, x3, [x1]
    mov     x1, #MAIR
    msr     mair_el2, x1
    msr     tcr_el2, x2
    msr     ttbr0_el2, x3

    // Nothing that this CPU held before it was turned off, or found by reset, holds any more.
    ic      iallu
    tlbi    alle1
    tlbi    alle2
    dsb     nsh
    isb
    movz    x1, #SCTLR_FINAL & 0xffff
    movk    x1, #SCTLR_FINAL >> 16, lsl #16
    msr     sctlr_el2, x1
    isb
    b       {secondary_start}

park:
    wfe
    b       park

/* Cleans and invalidates the data caches for [x0, x1) to the point of coherency. Uses x2 and x3. */
clean_and_invalidate:
    mrs     x2, ctr_el0
    ubfx    x2, x2, #16, #4                 // DminLine: log2 of the words of a line
    mov     x3, #4
    lsl     x3, x3, x2
1:  dc      civac, x0
    add     x0, x0, x3
    cmp     x0, x1
    b.lo    1b
    dsb     sy
    ret

    .popsection

/*
 * void switch_space(u64 ttbr0, u64 tcr, u64 sctlr): leaves the early tables for the final ones.
 *
 * Both map this code one to one. The MMU is off in between, so that no TLB ever holds entries of different
 * sizes for one address; no memory is accessed meanwhile.
 */
    .pushsection .text.switch_space, "ax", %progbits
    .balign 64
    .globl  switch_space
switch_space:
    dsb     sy
    mrs     x3, sctlr_el2
    bic     x3, x3, #SCTLR_M
    msr     sctlr_el2, x3
    isb
    tlbi    alle2
    dsb     nsh
    isb
    msr     tcr_el2, x1
    msr     ttbr0_el2, x0
    isb
    msr     sctlr_el2, x2
    isb
    ret
    .popsection
