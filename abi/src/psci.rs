//! Power State Coordination Interface (DEN 0022): numbers of the functions that Deed answers or relays.

/// `PSCI_VERSION`.
pub const VERSION: u32 = 0x8400_0000;
/// `CPU_SUSPEND`, SMC64.
pub const CPU_SUSPEND: u32 = 0xc400_0001;
/// `CPU_OFF`.
pub const CPU_OFF: u32 = 0x8400_0002;
/// `CPU_ON`, SMC64.
pub const CPU_ON: u32 = 0xc400_0003;
/// `AFFINITY_INFO`, SMC64.
pub const AFFINITY_INFO: u32 = 0xc400_0004;
/// `MIGRATE_INFO_TYPE`.
pub const MIGRATE_INFO_TYPE: u32 = 0x8400_0006;
/// `SYSTEM_OFF`.
pub const SYSTEM_OFF: u32 = 0x8400_0008;
/// `SYSTEM_RESET`.
pub const SYSTEM_RESET: u32 = 0x8400_0009;
/// `PSCI_FEATURES`.
pub const FEATURES: u32 = 0x8400_000a;
/// `SYSTEM_RESET2`, SMC64.
pub const SYSTEM_RESET2: u32 = 0xc400_0012;

/// Version 1.1, as `PSCI_VERSION` returns it.
pub const VERSION_1_1: u64 = 0x1_0001;

/// Return value: done.
pub const SUCCESS: u64 = 0;
/// Return value: no such function.
pub const NOT_SUPPORTED: u64 = -1i64 as u64;
/// Return value: an argument is wrong.
pub const INVALID_PARAMETERS: u64 = -2i64 as u64;
/// Return value: refused.
pub const DENIED: u64 = -3i64 as u64;
/// Return value of `CPU_ON`: it is on.
pub const ALREADY_ON: u64 = -4i64 as u64;
/// Return value of `CPU_ON`: another `CPU_ON` for it is under way.
pub const ON_PENDING: u64 = -5i64 as u64;
/// Return value: something inside failed.
pub const INTERNAL_FAILURE: u64 = -6i64 as u64;
/// Return value of `CPU_ON`: the entry point is no memory of the caller's.
pub const INVALID_ADDRESS: u64 = -9i64 as u64;

/// `AFFINITY_INFO`: the CPU is on.
pub const AFFINITY_ON: u64 = 0;
/// `AFFINITY_INFO`: the CPU is off.
pub const AFFINITY_OFF: u64 = 1;
/// `AFFINITY_INFO`: the CPU is on its way.
pub const AFFINITY_ON_PENDING: u64 = 2;
/// `MIGRATE_INFO_TYPE`: no migration is needed.
pub const MIGRATE_NOT_REQUIRED: u64 = 2;
