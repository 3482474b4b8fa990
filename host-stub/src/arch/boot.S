// Entry of the image: header, first tables, MMU.
//
// Entered as Linux is (Documentation/arch/arm64/booting.rst): x0 = physical address of the device tree,
// EL1, MMU and data cache off, interrupts masked, anywhere in RAM at a 2 MiB boundary.
//
// The tables made here map, in the upper half, the image in a window of 2 MiB and, in the linear map, the
// first GiB as device memory and the device tree. `paging.rs` adds RAM and tightens permissions.

    // Turns the MMU on with the tables below and goes on at an address of the upper half.
    .macro mmu_on next
    ldr     x0, ={mair}
    msr     mair_el1, x0
    ldr     x0, ={tcr}
    mrs     x1, id_aa64mmfr0_el1
    and     x1, x1, #0xf
    mov     x2, #5                          // 48 bits
    cmp     x1, x2
    csel    x1, x1, x2, lo
    bfi     x0, x1, #32, #3
    msr     tcr_el1, x0
    adrp    x0, boot_identity_l0
    msr     ttbr0_el1, x0
    adrp    x0, kernel_l0
    msr     ttbr1_el1, x0
    isb
    tlbi    vmalle1
    ic      iallu
    dsb     nsh
    isb
    ldr     x0, ={sctlr}
    msr     sctlr_el1, x0
    isb
    ldr     x0, =\next
    br      x0
    .endm

    // Takes the stack of CPU x0: the upper half of its room, twice a stack's size.
    .macro take_stack
    adrp    x1, _start_of_stacks
    add     x2, x0, #1
    add     x1, x1, x2, lsl #({stack_shift} + 1)
    sub     sp, x1, #16
    .endm

    .macro set_vectors
    adrp    x0, vectors
    add     x0, x0, :lo12:vectors
    msr     vbar_el1, x0
    isb
    mov     x29, xzr
    mov     x30, xzr
    .endm

    .section .head, "ax"
    .global _start
_start:
    b       begin
    .long   0
    .quad   0                               // text_offset
    .quad   _image_size
    .quad   0xa                             // little endian, 4 KiB pages, anywhere in memory
    .quad   0
    .quad   0
    .quad   0
    .ascii  "ARM\x64"
    .long   0

begin:
    mrs     x21, cntvct_el0
    mov     x19, x0
    mrs     x0, CurrentEL
    cmp     x0, #(1 << 2)
    b.ne    park
    adrp    x20, _start

    // Identity map for the moment in which the MMU comes on: the GiB that holds this code.
    adrp    x0, boot_identity_l0
    adrp    x1, boot_identity_l1
    orr     x2, x1, #{table}
    ubfx    x3, x20, #39, #9
    str     x2, [x0, x3, lsl #3]
    lsr     x2, x20, #30
    ubfx    x3, x20, #30, #9
    lsl     x2, x2, #30
    ldr     x4, ={executable_block}
    orr     x2, x2, x4
    str     x2, [x1, x3, lsl #3]

    // The image's window.
    adrp    x0, kernel_l0
    adrp    x1, window_l1
    orr     x2, x1, #{table}
    str     x2, [x0, #(256 * 8)]
    adrp    x3, window_l2
    orr     x2, x3, #{table}
    str     x2, [x1]
    adrp    x1, window_l3
    orr     x2, x1, #{table}
    str     x2, [x3]
    ldr     x4, ={window_page}
    orr     x2, x20, x4
    mov     x3, #512
1:  str     x2, [x1], #8
    add     x2, x2, #4096
    subs    x3, x3, #1
    b.ne    1b

    // The linear map: devices, and the two blocks in which the device tree lies.
    adrp    x1, linear_l1
    orr     x2, x1, #{table}
    str     x2, [x0]
    ldr     x2, ={device_block}
    str     x2, [x1]
    adrp    x3, linear_l2
    orr     x2, x3, #{table}
    lsr     x4, x19, #30
    str     x2, [x1, x4, lsl #3]
    ubfx    x4, x19, #21, #9
    lsr     x2, x19, #21
    lsl     x2, x2, #21
    ldr     x5, ={memory_block}
    orr     x2, x2, x5
    str     x2, [x3, x4, lsl #3]
    cmp     x4, #511
    b.eq    2f
    add     x4, x4, #1
    add     x2, x2, #(1 << 21)
    str     x2, [x3, x4, lsl #3]

    // The stores above went past the cache: drop what it may still hold of the tables.
2:  dmb     sy
    adrp    x0, boot_tables
    adrp    x1, boot_tables_end
    mrs     x2, ctr_el0
    ubfx    x2, x2, #16, #4
    mov     x3, #4
    lsl     x3, x3, x2
3:  dc      ivac, x0
    add     x0, x0, x3
    cmp     x0, x1
    b.lo    3b
    dsb     sy

    mmu_on upper_half

upper_half:
    mov     x0, #0
    take_stack
    adrp    x0, _start_of_bss
    add     x0, x0, :lo12:_start_of_bss
    adrp    x1, _end_of_bss
    add     x1, x1, :lo12:_end_of_bss
4:  cmp     x0, x1
    b.hs    5f
    stp     xzr, xzr, [x0], #16
    b       4b
5:  set_vectors
    mov     x0, x19
    mov     x1, x20
    mov     x2, x21
    b       kernel_entry

    // Where PSCI's CPU_ON lets another CPU begin, as the boot CPU did; x0 = its number.
    .global secondary_start
secondary_start:
    mov     x19, x0
    mmu_on secondary_upper_half

secondary_upper_half:
    mov     x0, x19
    take_stack
    set_vectors
    mov     x0, x19
    b       secondary_entry

park:
    wfe
    b       park
    .ltorg

    .section .tables, "aw", @progbits
    .balign 4096
    .global no_program_l0, window_l3, linear_l1, linear_l2
boot_tables:
boot_identity_l0:
    .zero   4096
boot_identity_l1:
    .zero   4096
kernel_l0:
    .zero   4096
window_l1:
    .zero   4096
window_l2:
    .zero   4096
window_l3:
    .zero   4096
no_program_l0:
    .zero   4096
linear_l1:
    .zero   4096
linear_l2:
    .zero   4096 * {linear_l2_tables}
boot_tables_end:
