//! The Arm SMC Calling Convention (DEN 0028), as far as Deed is callee.

/// Status in x0: the call was served (its own result is elsewhere, see the call).
pub const SUCCESS: u64 = 0;
/// Status in x0: no such call, or a non-zero immediate (DEN 0028, section 5.2).
pub const NOT_SUPPORTED: u64 = -1i64 as u64;
/// Status in x0 of guest calls: an argument is not acceptable (DEN 0028, section 5.2).
pub const INVALID_PARAMETER: u64 = -3i64 as u64;

/// `SMCCC_VERSION`.
pub const VERSION: u32 = 0x8000_0000;
/// `SMCCC_ARCH_FEATURES`.
pub const ARCH_FEATURES: u32 = 0x8000_0001;
/// `SMCCC_ARCH_WORKAROUND_1`, against CVE-2017-5715 (DEN 0028, 7.6).
pub const ARCH_WORKAROUND_1: u32 = 0x8000_8000;
/// `SMCCC_ARCH_WORKAROUND_2`, against CVE-2018-3639.
pub const ARCH_WORKAROUND_2: u32 = 0x8000_7fff;
/// `SMCCC_ARCH_WORKAROUND_3`, against CVE-2022-23960.
pub const ARCH_WORKAROUND_3: u32 = 0x8000_3fff;
/// `TRNG_VERSION` (Arm True Random Number Generator Firmware Interface, DEN 0098).
pub const TRNG_VERSION: u32 = 0x8400_0050;
/// `TRNG_FEATURES`.
pub const TRNG_FEATURES: u32 = 0x8400_0051;
/// `TRNG_GET_UUID`.
pub const TRNG_GET_UUID: u32 = 0x8400_0052;
/// `TRNG_RND`, SMC32; bit 30 makes it SMC64.
pub const TRNG_RND: u32 = 0x8400_0053;
/// The version that Deed implements: 1.1.
pub const VERSION_1_1: u64 = 0x1_0001;

/// "Call UID" query of the vendor-specific hypervisor range.
pub const VENDOR_HYP_UID: u32 = 0x8600_ff01;

/// Bit 16 of a function id: the caller's hint that it has no live SVE state. It is no part of the number.
pub const SVE_HINT: u32 = 1 << 16;

/// A function id as found in w0, with the hint bit removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FunctionId(u32);

impl FunctionId {
    /// Takes the function id out of x0. The upper half of x0 is no part of it (DEN 0028, section 2.5),
    /// so a caller that leaves rubbish there is served all the same.
    pub const fn from_x0(x0: u64) -> Self {
        Self(x0 as u32 & !SVE_HINT)
    }

    /// The 32-bit number.
    pub const fn number(self) -> u32 {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sve_hint_and_the_upper_half_are_no_part_of_the_number() {
        assert_eq!(FunctionId::from_x0(0xdead_beef_8601_ff01).number(), VENDOR_HYP_UID);
    }
}
