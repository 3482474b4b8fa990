//! The calls of the host: SMC64 fast calls over HVC in the vendor-specific hypervisor range.
//!
//! Registers of a call: x0 function id, x1 to x6 arguments. Registers of a result: x0 SMCCC status; if that
//! is success, x1 is 0 or a negated [`Error`](crate::Error), x2 the number of pages done (of range calls) or of pages
//! lacking (with [`Error::NoMemory`](crate::Error::NoMemory)), x3 to x9 further values. Registers that a result does not name come
//! back as 0 (x1 to x3) or unchanged (the others).

mod call;
mod result;
mod test_calls;

pub use call::{DecodeError, HostCall};
pub use result::HostResult;
pub use test_calls::{EventKind, FailureKind};

/// Pages of a VM's root table: two start-level tables that together translate 40 bits.
pub const VM_ROOT_PAGES: u64 = 2;

/// First function id of the host calls.
pub const FIRST: u32 = 0xc600_0100;

/// Version of this interface: a change that breaks a caller raises the major number.
pub const VERSION_MAJOR: u16 = 0;
/// Minor version.
pub const VERSION_MINOR: u16 = 1;

/// The UID with which Deed answers its host: f6b5ae1c-5e3e-4c1a-9d5b-6d1c2b7e4a90, as four words.
pub const DEED_UID: [u32; 4] = [0x1cae_b5f6, 0x1a4c_3e5e, 0x1c6d_5b9d, 0x904a_7e2b];

/// Feature bit of `VERSION`: the test calls are served.
pub const FEATURE_TEST_CALLS: u64 = 1 << 0;

/// What a call returns besides its error, for documents and tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CallInfo {
    /// Function id.
    pub number: u32,
    /// Name in documents.
    pub name: &'static str,
    /// Names of x1, x2, ...
    pub arguments: &'static [&'static str],
    /// Names of x2, x3, ... of the result.
    pub results: &'static [&'static str],
    /// Served in test builds only.
    pub test_only: bool,
}

/// Every host call with its registers; `docs/hypercalls.md` has the same table.
pub const CALLS: &[CallInfo] = &[
    info(0x00, "VERSION", &[], &["version", "features", "max_vms", "max_vcpus", "ipa_bits"], false),
    info(0x01, "POOL_TOPUP", &["pool", "pfn", "pages"], &["done"], false),
    info(0x02, "VM_TOPUP", &["vm", "pfn", "pages"], &["done"], false),
    info(0x03, "SHARE_HYP", &["pfn", "pages"], &["done"], false),
    info(0x04, "UNSHARE_HYP", &["pfn", "pages"], &["done"], false),
    info(0x05, "DONATE_GUEST", &["vm", "pfn", "gfn", "pages"], &["done"], false),
    info(0x06, "SHARE_GUEST", &["vm", "pfn", "gfn", "pages", "permissions"], &["done"], false),
    info(0x07, "UNSHARE_GUEST", &["vm", "gfn", "pages"], &["done"], false),
    info(0x08, "RECLAIM_GUEST", &["vm", "gfn", "pages"], &["done"], false),
    info(0x09, "QUERY_PAGE", &["pfn"], &["state", "ram"], false),
    info(0x0a, "FORCE_RECLAIM", &["pfn", "pages"], &["done"], false),
    info(0x10, "VM_CREATE", &["flags", "root"], &["vm"], false),
    info(0x11, "VCPU_CREATE", &["vm", "vcpu"], &[], false),
    info(0x12, "VCPU_SET_BOOT", &["vm", "vcpu", "pc", "x0"], &[], false),
    info(
        0x13,
        "VCPU_RUN",
        &["vm", "vcpu", "value0", "value1", "value2", "value3"],
        &["reason", "data0", "data1", "data2", "data3", "data4", "data5", "data6"],
        false,
    ),
    info(0x14, "VCPU_GET_REG", &["vm", "vcpu", "register"], &["value"], false),
    info(0x15, "VCPU_SET_REG", &["vm", "vcpu", "register", "value"], &[], false),
    info(0x16, "UNSHARE_ACK", &["vm", "vcpu"], &["done"], false),
    info(0x17, "VM_TEARDOWN_START", &["vm"], &[], false),
    info(0x18, "VM_TEARDOWN_FINISH", &["vm"], &["done", "left"], false),
    info(0xf0, "TEST_PAGE", &["pfn"], &["host_state", "owner", "vm", "gfn", "hyp_state"], true),
    info(
        0xf1,
        "TEST_CENSUS",
        &[],
        &[
            "host_pages",
            "hyp_pages",
            "guest_pages",
            "table_pages_used",
            "table_pages_free",
            "metadata_bytes_used",
        ],
        true,
    ),
    info(0xf2, "TEST_PIN", &["pfn"], &[], true),
    info(0xf3, "TEST_UNPIN", &["pfn"], &[], true),
    info(
        0xf4,
        "TEST_COUNTERS",
        &[],
        &["aborts_injected", "aborts_retried", "host_calls", "guest_entries"],
        true,
    ),
    info(0xf5, "TEST_EVENTS", &["from"], &["number", "kind", "vmid", "address", "old", "new"], true),
    info(0xf6, "TEST_FAIL", &["kind", "pfn"], &[], true),
];

const fn info(
    n: u32,
    name: &'static str,
    arguments: &'static [&'static str],
    results: &'static [&'static str],
    test_only: bool,
) -> CallInfo {
    CallInfo { number: FIRST + n, name, arguments, results, test_only }
}

/// A register of a non-protected vCPU, as `VCPU_GET_REG` and `VCPU_SET_REG` name it: 0 to 30 are x0 to x30,
/// then as below. From 64 on they are the system registers of EL1 and EL0. Numbers are never reused.
#[expect(missing_docs, reason = "the system registers are the architecture's, by their names")]
pub mod register {
    /// Program counter.
    pub const PC: u64 = 31;
    /// Processor state.
    pub const PSTATE: u64 = 32;
    /// Stack pointer of EL0.
    pub const SP_EL0: u64 = 33;
    /// Stack pointer of EL1.
    pub const SP_EL1: u64 = 34;

    pub const SCTLR_EL1: u64 = 64;
    pub const CPACR_EL1: u64 = 65;
    pub const TTBR0_EL1: u64 = 66;
    pub const TTBR1_EL1: u64 = 67;
    pub const TCR_EL1: u64 = 68;
    pub const ESR_EL1: u64 = 69;
    pub const AFSR0_EL1: u64 = 70;
    pub const AFSR1_EL1: u64 = 71;
    pub const FAR_EL1: u64 = 72;
    pub const MAIR_EL1: u64 = 73;
    pub const VBAR_EL1: u64 = 74;
    pub const CONTEXTIDR_EL1: u64 = 75;
    pub const TPIDR_EL0: u64 = 76;
    pub const TPIDRRO_EL0: u64 = 77;
    pub const TPIDR_EL1: u64 = 78;
    pub const AMAIR_EL1: u64 = 79;
    pub const CNTKCTL_EL1: u64 = 80;
    pub const PAR_EL1: u64 = 81;
    pub const ELR_EL1: u64 = 82;
    pub const SPSR_EL1: u64 = 83;
    pub const CSSELR_EL1: u64 = 84;
    pub const CNTV_CTL_EL0: u64 = 85;
    pub const CNTV_CVAL_EL0: u64 = 86;
}

/// Registers that a call takes: x0 to x6.
pub const CALL_WORDS: usize = 7;
/// Registers that a result takes: x0 to x9.
pub const RESULT_WORDS: usize = 10;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Error;
    use crate::page::{Permissions, Pool, VmFlags, VmHandle};

    fn samples() -> [HostCall; 27] {
        let vm = VmHandle::new(3, 9).unwrap();
        [
            HostCall::Version,
            HostCall::PoolTopUp { pool: Pool::Metadata, pfn: 1, pages: 2 },
            HostCall::VmTopUp { vm, pfn: 1, pages: 2 },
            HostCall::ShareHyp { pfn: 1, pages: 2 },
            HostCall::UnshareHyp { pfn: 1, pages: 2 },
            HostCall::DonateGuest { vm, pfn: 1, gfn: 2, pages: 3 },
            HostCall::ShareGuest { vm, pfn: 1, gfn: 2, pages: 3, permissions: Permissions::ALL },
            HostCall::UnshareGuest { vm, gfn: 2, pages: 3 },
            HostCall::ReclaimGuest { vm, gfn: 2, pages: 3 },
            HostCall::QueryPage { pfn: 8 },
            HostCall::ForceReclaim { pfn: 1, pages: 2 },
            HostCall::VmCreate { flags: VmFlags { protected: true, ..VmFlags::default() }, root: 8 },
            HostCall::VcpuCreate { vm, vcpu: 1 },
            HostCall::VcpuSetBoot { vm, vcpu: 1, pc: 2, x0: 3 },
            HostCall::VcpuRun { vm, vcpu: 1, values: [1, 2, 3, 4] },
            HostCall::VcpuGetReg { vm, vcpu: 1, register: 2 },
            HostCall::VcpuSetReg { vm, vcpu: 1, register: 2, value: 3 },
            HostCall::UnshareAck { vm, vcpu: 1 },
            HostCall::VmTeardownStart { vm },
            HostCall::VmTeardownFinish { vm },
            HostCall::TestPage { pfn: 1 },
            HostCall::TestCensus,
            HostCall::TestPin { pfn: 1 },
            HostCall::TestUnpin { pfn: 1 },
            HostCall::TestCounters,
            HostCall::TestEvents { from: 7 },
            HostCall::TestFail { kind: 1, pfn: 8 },
        ]
    }

    #[test]
    fn every_call_survives_its_registers_and_is_described_once() {
        assert_eq!(samples().len(), CALLS.len());
        for (call, info) in samples().into_iter().zip(CALLS) {
            let words = call.encode();
            assert_eq!(HostCall::decode(&words), Ok(call));
            assert_eq!(words[0], u64::from(info.number), "{}", info.name);
            assert_eq!(call.is_test(), info.test_only, "{}", info.name);
        }
    }

    #[test]
    fn a_call_of_test_builds_is_known_as_one() {
        for (call, info) in samples().into_iter().zip(CALLS) {
            assert_eq!(call.is_test(), info.test_only, "{}", info.name);
        }
    }

    #[test]
    fn unknown_numbers_and_impossible_words_are_told_apart() {
        let decode = |words| HostCall::decode(&words);
        assert_eq!(decode([0xc600_01ff, 0, 0, 0, 0, 0, 0]), Err(DecodeError::UnknownFunction));
        assert_eq!(decode([0, 0, 0, 0, 0, 0, 0]), Err(DecodeError::UnknownFunction));
        let bad = |error| Err(DecodeError::BadArgument(error));
        assert_eq!(decode([0xc600_0105, 0, 0, 0, 0, 0, 0]), bad(Error::NoEntry));
        assert_eq!(decode([0xc600_0110, 1 << 40, 0, 0, 0, 0, 0]), bad(Error::Invalid));
        assert_eq!(decode([0xc600_0101, 2, 0, 0, 0, 0, 0]), bad(Error::Invalid));
    }

    #[test]
    fn a_result_survives_its_registers() {
        let result = HostResult::lacking(Pool::Vm, 8);
        let mut words = [0; RESULT_WORDS];
        words[1..].copy_from_slice(&result.to_words());
        assert_eq!(HostResult::from_words(&words), Some(result));
        words[0] = crate::smccc::NOT_SUPPORTED;
        assert_eq!(HostResult::from_words(&words), None);
    }
}
