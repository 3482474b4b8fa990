// Entry of a guest. The boot vCPU starts at the first byte of the image, the others at
// deed_guest_secondary, which the guest's own CPU_ON names.
//
// The boot vCPU first writes every register that it finds to the entry record: a guest that looks for
// another guest's leftovers reads them there.

    .arch_extension fp
    .arch_extension simd

    .section .text.entry, "ax"
    .global _start
_start:
    mov     sp, x0
    adrp    x0, deed_guest_entry_record
    add     x0, x0, :lo12:deed_guest_entry_record
    stp     x1, x2, [x0, #8]
    stp     x3, x4, [x0, #24]
    stp     x5, x6, [x0, #40]
    stp     x7, x8, [x0, #56]
    stp     x9, x10, [x0, #72]
    stp     x11, x12, [x0, #88]
    stp     x13, x14, [x0, #104]
    stp     x15, x16, [x0, #120]
    stp     x17, x18, [x0, #136]
    stp     x19, x20, [x0, #152]
    stp     x21, x22, [x0, #168]
    stp     x23, x24, [x0, #184]
    stp     x25, x26, [x0, #200]
    stp     x27, x28, [x0, #216]
    stp     x29, x30, [x0, #232]
    mov     x19, sp
    str     x19, [x0], #248
    bl      deed_guest_record_system_registers

    mrs     x1, cpacr_el1
    orr     x1, x1, #(3 << 20)
    msr     cpacr_el1, x1
    isb
    stp     q0, q1, [x0], #32
    stp     q2, q3, [x0], #32
    stp     q4, q5, [x0], #32
    stp     q6, q7, [x0], #32
    stp     q8, q9, [x0], #32
    stp     q10, q11, [x0], #32
    stp     q12, q13, [x0], #32
    stp     q14, q15, [x0], #32
    stp     q16, q17, [x0], #32
    stp     q18, q19, [x0], #32
    stp     q20, q21, [x0], #32
    stp     q22, q23, [x0], #32
    stp     q24, q25, [x0], #32
    stp     q26, q27, [x0], #32
    stp     q28, q29, [x0], #32
    stp     q30, q31, [x0], #32
    mrs     x1, fpcr
    mrs     x2, fpsr
    stp     x1, x2, [x0]

    bl      deed_guest_enable_mmu
    adrp    x1, deed_guest_stacks
    add     x1, x1, :lo12:deed_guest_stacks
    add     x1, x1, #{stack_size}
    mov     sp, x1
    mov     x0, x19
    bl      deed_guest_start
0:  wfe
    b       0b

// x0 = the context that CPU_ON gave.
    .global deed_guest_secondary
deed_guest_secondary:
    mov     x19, x0
    mrs     x1, cpacr_el1
    orr     x1, x1, #(3 << 20)
    msr     cpacr_el1, x1
    bl      deed_guest_enable_mmu
    adrp    x1, deed_guest_stacks
    add     x1, x1, :lo12:deed_guest_stacks
    add     x1, x1, #(2 * {stack_size})
    mov     sp, x1
    mov     x0, x19
    bl      deed_guest_secondary_start
0:  wfe
    b       0b

// Turns the MMU and the caches on with the tables below; uses x0 to x2.
deed_guest_enable_mmu:
    adrp    x0, deed_guest_level1
    msr     ttbr0_el1, x0
    msr     ttbr1_el1, xzr
    ldr     x0, ={mair}
    msr     mair_el1, x0
    ldr     x0, ={tcr}
    mrs     x1, id_aa64mmfr0_el1    // PARange, at most 48 bits, is TCR_EL1.IPS
    and     x1, x1, #0xf
    mov     x2, #5
    cmp     x1, x2
    csel    x1, x1, x2, lo
    orr     x0, x0, x1, lsl #32
    msr     tcr_el1, x0
    adrp    x0, deed_guest_vectors
    add     x0, x0, :lo12:deed_guest_vectors
    msr     vbar_el1, x0
    tlbi    vmalle1
    dsb     nsh
    isb
    ldr     x0, ={sctlr}
    msr     sctlr_el1, x0
    isb
    ret
    .ltorg

// Exception vectors: every entry saves x0 to x30, ELR and SPSR as an ExceptionFrame and tells its number.
    .section .text.vectors, "ax"
    .balign 2048
deed_guest_vectors:
    .set    entry, 0
    .rept   16
    .balign 128
    sub     sp, sp, #272
    stp     x0, x1, [sp]
    mov     x0, #entry
    b       deed_guest_common
    .set    entry, entry + 1
    .endr

deed_guest_common:
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
    mrs     x1, elr_el1
    stp     x30, x1, [sp, #240]
    mrs     x1, spsr_el1
    str     x1, [sp, #256]
    mov     x1, sp
    bl      deed_guest_exception
    ldr     x1, [sp, #256]
    msr     spsr_el1, x1
    ldp     x30, x1, [sp, #240]
    msr     elr_el1, x1
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
    ldp     x0, x1, [sp], #272
    eret

// Stage-1 tables, complete at link time: nothing is written before the MMU is on. 39-bit addresses,
// identity: the device's 2 MiB, 4 MiB of RAM, and 2 MiB behind it
// where there is no memory.
    .section .rodata.tables, "a"
    .balign 4096
deed_guest_level1:
    .quad   deed_guest_level2_low + {table}
    .quad   0
    .quad   deed_guest_level2_ram + {table}
    .fill   509, 8, 0
deed_guest_level2_low:
    .fill   {device_base} / {block}, 8, 0
    .quad   ({device_base} & ~({block} - 1)) + {device}
    .fill   511 - {device_base} / {block}, 8, 0
deed_guest_level2_ram:
    .quad   {ram_base} + {normal}
    .quad   {ram_base} + {block} + {normal}
    .quad   {ram_base} + 2 * {block} + {normal}
    .fill   509, 8, 0

    .section .bss.entry, "aw", @nobits
    .balign 16
    .global deed_guest_entry_record
deed_guest_entry_record:
    .skip   {record_size}
    .balign 16
deed_guest_stacks:
    .skip   2 * {stack_size}
