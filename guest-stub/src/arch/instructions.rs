//! Single instructions as functions.

use core::arch::asm;

/// Reads a system register by name.
#[macro_export]
macro_rules! read_register {
    ($name:literal) => {{
        let value: u64;
        // SAFETY: MRS writes nothing but the named output; where the register is UNDEFINED the vectors
        // report or skip it.
        unsafe {
            core::arch::asm!(concat!("mrs {0}, ", $name), out(reg) value, options(nostack, preserves_flags))
        };
        value
    }};
}

/// Writes a system register by name, with an ISB after it.
#[macro_export]
macro_rules! write_register {
    ($name:literal, $value:expr) => {{
        let value: u64 = $value;
        // SAFETY: the caller names a register on which no Rust code of the guest depends: not the stack,
        // the tables or the vectors.
        unsafe {
            core::arch::asm!(concat!("msr ", $name, ", {0}"), "isb", in(reg) value, options(nostack, preserves_flags))
        };
    }};
}

/// HVC #0 with x0 to x6; returns x0 to x3.
pub fn hvc(x: [u64; 7]) -> [u64; 4] {
    let [mut x0, mut x1, mut x2, mut x3, x4, x5, x6] = x;
    // SAFETY: SMCCC: x0 to x3 are results, all other registers are kept. What the call does to memory (pages
    // that become shared or go away) concerns pages that the caller reaches by device-like accesses only.
    unsafe {
        asm!("hvc #0", inout("x0") x0, inout("x1") x1, inout("x2") x2, inout("x3") x3,
             in("x4") x4, in("x5") x5, in("x6") x6, options(nostack))
    };
    [x0, x1, x2, x3]
}

/// HVC #0 with x0 to x6, between two reads of the virtual counter; returns their difference and x0 to x3.
pub fn timed_hvc(x: [u64; 7]) -> (u64, [u64; 4]) {
    let [mut x0, mut x1, mut x2, mut x3, x4, x5, x6] = x;
    let (begin, end): (u64, u64);
    // SAFETY: as for `hvc`; the counter changes nothing.
    unsafe {
        asm!("mrs {begin}, cntvct_el0", "hvc #0", "mrs {end}, cntvct_el0",
             begin = out(reg) begin, end = out(reg) end,
             inout("x0") x0, inout("x1") x1, inout("x2") x2, inout("x3") x3,
             in("x4") x4, in("x5") x5, in("x6") x6, options(nostack))
    };
    (end.wrapping_sub(begin), [x0, x1, x2, x3])
}

/// STR of 8 zero bytes, between two reads of the virtual counter; returns their difference.
pub fn timed_store64(address: u64) -> u64 {
    let (begin, end): (u64, u64);
    // SAFETY: as for the other stores.
    unsafe {
        asm!("mrs {begin}, cntvct_el0", "str xzr, [{address}]", "mrs {end}, cntvct_el0",
             begin = out(reg) begin, end = out(reg) end, address = in(reg) address, options(nostack))
    };
    end.wrapping_sub(begin)
}

/// HVC #1, which is no call.
pub fn hvc_immediate_1(function: u32) -> u64 {
    let mut x0 = u64::from(function);
    // SAFETY: as for `hvc`.
    unsafe {
        asm!("hvc #1", inout("x0") x0, inout("x1") 0u64 => _, inout("x2") 0u64 => _, inout("x3") 0u64 => _,
             options(nostack))
    };
    x0
}

/// SMC #0 with a function id and three zero arguments; returns x0.
pub fn smc(function: u32) -> u64 {
    let mut x0 = u64::from(function);
    // SAFETY: as for `hvc`; the word is the encoding of SMC #0, which some assemblers hide.
    unsafe {
        asm!(".inst 0xd4000003", inout("x0") x0, inout("x1") 0u64 => _, inout("x2") 0u64 => _,
             inout("x3") 0u64 => _, options(nostack))
    };
    x0
}

macro_rules! loads {
    ($($(#[$doc:meta])* $name:ident $instruction:literal;)*) => {$(
        $(#[$doc])*
        pub fn $name(address: u64) -> u64 {
            let value: u64;
            // SAFETY: a load with a plain register address, so that it has a syndrome; it changes no memory
            // that Rust knows of, and where nothing is mapped the vectors report or skip it.
            unsafe { asm!($instruction, value = out(reg) value, address = in(reg) address, options(nostack)) };
            value
        }
    )*};
}

loads! {
    /// LDR of 8 bytes.
    load64 "ldr {value:x}, [{address}]";
    /// LDR of 4 bytes, zero-extended.
    load32 "ldr {value:w}, [{address}]";
    /// LDRH.
    load16 "ldrh {value:w}, [{address}]";
    /// LDRB.
    load8 "ldrb {value:w}, [{address}]";
    /// LDRSW: sign-extended to 64 bits.
    load32_signed "ldrsw {value:x}, [{address}]";
    /// LDRSH, sign-extended to 64 bits.
    load16_signed "ldrsh {value:x}, [{address}]";
    /// LDRSB, sign-extended to 64 bits.
    load8_signed "ldrsb {value:x}, [{address}]";
    /// LDRSH, sign-extended to 32 bits: the upper half of the register is zero.
    load16_signed_32 "ldrsh {value:w}, [{address}]";
    /// LDRSB, sign-extended to 32 bits: the upper half of the register is zero.
    load8_signed_32 "ldrsb {value:w}, [{address}]";
    /// LDP of two words, whose sum is the value: an access without syndrome.
    load_pair "ldp {value:x}, xzr, [{address}]";
    /// LDXR: an exclusive, which has no syndrome either.
    load_exclusive "ldxr {value:x}, [{address}]";
}

macro_rules! stores {
    ($($(#[$doc:meta])* $name:ident $instruction:literal;)*) => {$(
        $(#[$doc])*
        pub fn $name(address: u64, value: u64) {
            // SAFETY: a store with a plain register address. The callers store to the device or to pages of
            // guest RAM that the linker gives to nobody.
            unsafe { asm!($instruction, value = in(reg) value, address = in(reg) address, options(nostack)) };
        }
    )*};
}

stores! {
    /// STR of 8 bytes.
    store64 "str {value:x}, [{address}]";
    /// STR of 4 bytes.
    store32 "str {value:w}, [{address}]";
    /// STRH.
    store16 "strh {value:w}, [{address}]";
    /// STRB.
    store8 "strb {value:w}, [{address}]";
}

/// STR XZR: a store whose source is the zero register.
pub fn store64_zero_register(address: u64) {
    // SAFETY: as for the other stores.
    unsafe { asm!("str xzr, [{0}]", in(reg) address, options(nostack)) };
}

/// LDR XZR: a load whose target is the zero register.
pub fn load64_zero_register(address: u64) {
    // SAFETY: as for the other loads.
    unsafe { asm!("ldr xzr, [{0}]", in(reg) address, options(nostack)) };
}

/// Runs for ever with these words in x0 to x7, and again in x8 to x15, x16 to x23, x24 to x30.
pub fn spin_with(words: &[u64; 8]) -> ! {
    // SAFETY: nothing comes behind it, so all registers are free. The loads read the array and no more.
    unsafe {
        asm!(
            "ldp x2, x3, [x0, #16]",
            "ldp x4, x5, [x0, #32]",
            "ldp x6, x7, [x0, #48]",
            "ldp x8, x9, [x0, #0]",
            "ldp x10, x11, [x0, #16]",
            "ldp x12, x13, [x0, #32]",
            "ldp x14, x15, [x0, #48]",
            "ldp x16, x17, [x0, #0]",
            "ldp x18, x19, [x0, #16]",
            "ldp x20, x21, [x0, #32]",
            "ldp x22, x23, [x0, #48]",
            "ldp x24, x25, [x0, #0]",
            "ldp x26, x27, [x0, #16]",
            "ldp x28, x29, [x0, #32]",
            "ldr x30, [x0, #48]",
            "ldp x0, x1, [x0, #0]",
            "2: b 2b",
            in("x0") words,
            options(noreturn),
        )
    }
}

/// Puts 64 bytes into the vector registers v8 to v11, which no Rust code of a guest touches.
pub fn set_vectors(words: &[u64; 8]) {
    // SAFETY: the guests are built without floating point, so these registers are nobody's. The loads read
    // the array and no more.
    unsafe {
        asm!(".arch_extension fp", ".arch_extension simd", "ldp q8, q9, [{0}]", "ldp q10, q11, [{0}, #32]",
             in(reg) words, options(nostack, preserves_flags, readonly))
    };
}

/// Reads v8 to v11.
pub fn vectors() -> [u64; 8] {
    let mut words = [0; 8];
    // SAFETY: the stores write the array and no more.
    unsafe {
        asm!(".arch_extension fp", ".arch_extension simd", "stp q8, q9, [{0}]", "stp q10, q11, [{0}, #32]",
             in(reg) &mut words, options(nostack, preserves_flags))
    };
    words
}

/// Writes two instructions to an address and calls them with x0 = `argument`; returns x0. The second one must
/// be RET, the first may touch x0 and system registers only.
pub fn call_code(address: u64, instructions: [u32; 2], argument: u64) -> u64 {
    let [first, second] = instructions;
    store64(address, u64::from(second) << 32 | u64::from(first));
    let mut x0 = argument;
    // SAFETY: the maintenance makes the stored words visible to instruction fetch before they are called. They
    // change x0 and a system register on which no Rust code of the guest depends; an instruction that is
    // UNDEFINED is skipped by the vectors.
    unsafe {
        asm!("dc cvau, {address}", "dsb ish", "ic ivau, {address}", "dsb ish", "isb", "blr {address}", "isb",
             address = in(reg) address, inout("x0") x0, out("x30") _, options(nostack))
    };
    x0
}

/// Calls an address where there is RET, or where nothing can be fetched: then the vectors return in its stead, if the
/// exception is expected.
pub fn call_page(address: u64) {
    // SAFETY: RET comes straight back and changes nothing; where the fetch takes an exception, the vectors go to x30,
    // which is the same. Caches of instructions are dropped first, since others write the page.
    unsafe {
        asm!("ic iallu", "dsb nsh", "isb", "blr {address}", address = in(reg) address, out("x30") _,
             options(nostack))
    };
}
