//! The calls of a guest: those that Linux guests already use, so that an unmodified kernel with its pKVM
//! guest driver works (Linux `Documentation/virt/kvm/arm/hypercalls.rst`; the range forms are Android's).
//!
//! All of them are answered by the hypervisor itself. In every range form x1 is a page-aligned IPA, x2 the
//! number of pages (0 means 1), x3 must be 0, and x1 of the result is the number of pages done: a guest
//! calls again for the rest.

/// `ARM_SMCCC_VENDOR_HYP_KVM_FEATURES`: x0 = bit map of the functions 0 to 31.
pub const FEATURES: u32 = 0x8600_0000;
/// `PTP`: served by the host; shows it x0 to x6 and takes x0 to x3 back.
pub const PTP: u32 = 0x8600_0001;
/// `HYP_MEMINFO`: x0 = granule of sharing in bytes.
pub const HYP_MEMINFO: u32 = 0xc600_0002;
/// `MEM_SHARE`: the host may access the pages from now on.
pub const MEM_SHARE: u32 = 0xc600_0003;
/// `MEM_UNSHARE`: the pages are private again when the call has returned success.
pub const MEM_UNSHARE: u32 = 0xc600_0004;
/// `MMIO_GUARD_INFO`: x0 = granule in bytes.
pub const MMIO_GUARD_INFO: u32 = 0xc600_0005;
/// `MMIO_GUARD_ENROLL`: from now on only addresses given to `MMIO_GUARD_MAP` are devices.
pub const MMIO_GUARD_ENROLL: u32 = 0xc600_0006;
/// `MMIO_GUARD_MAP`: accesses to this page may be shown to the host.
pub const MMIO_GUARD_MAP: u32 = 0xc600_0007;
/// `MMIO_GUARD_UNMAP`: takes it back.
pub const MMIO_GUARD_UNMAP: u32 = 0xc600_0008;
/// `MEM_RELINQUISH`: gives pages back to the host, wiped.
pub const MEM_RELINQUISH: u32 = 0xc600_0009;

/// Answer to the UID query in the guest's view: KVM's 28b46fb6-2ec5-11e9-a9ca-4b564d003a74.
pub const KVM_UID: [u32; 4] = [0xb66f_b428, 0xe911_c52e, 0x564b_caa9, 0x743a_004d];

/// Result of a guest call that failed for its arguments or for the state of the page.
pub const INVALID_PARAMETER: u64 = crate::smccc::INVALID_PARAMETER;

/// The functions that Deed offers to a protected guest, as `FEATURES` reports them.
pub const PROTECTED_FEATURES: u64 =
    1 << 0 | 1 << 2 | 1 << 3 | 1 << 4 | 1 << 5 | 1 << 6 | 1 << 7 | 1 << 8 | 1 << 9;
