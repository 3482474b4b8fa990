//! The calls of the host: SMC64 fast calls over HVC in the vendor-specific hypervisor range.
//!
//! Registers of a call: x0 function id, x1 to x6 arguments. Registers of a result: x0 SMCCC status; if that
//! is success, x1 is 0 or a negated [`Error`], x2 the number of pages done (of range calls) or of pages
//! lacking (with [`Error::NoMemory`]), x3 to x9 further values. Registers that a result does not name come
//! back as 0 (x1 to x3) or unchanged (the others).

use crate::error::Error;
use crate::page::{HostState, Permissions, Pool, VmFlags, VmHandle};
use crate::smccc::FunctionId;

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
    info(0xf6, TEST_FAIL, &["kind", "pfn"], &[], true),
];

/// Name of the call that breaks the hypervisor: who makes all calls, or random ones, leaves it out.
pub const TEST_FAIL: &str = "TEST_FAIL";

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

/// A call of the host, decoded. The numbers in it are allegations: page numbers and counts are checked
/// against RAM and state by whoever serves the call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HostCall {
    /// Which interface is this?
    Version,
    /// Gives pages to one of the hypervisor's pools.
    PoolTopUp {
        /// [`Pool::Tables`] or [`Pool::Metadata`].
        pool: Pool,
        /// First page.
        pfn: u64,
        /// Number of pages.
        pages: u64,
    },
    /// Gives pages to a VM for its tables. They come back at the end of its teardown.
    VmTopUp {
        /// The VM.
        vm: VmHandle,
        /// First page.
        pfn: u64,
        /// Number of pages.
        pages: u64,
    },
    /// Lends pages to the hypervisor.
    ShareHyp {
        /// First page.
        pfn: u64,
        /// Number of pages.
        pages: u64,
    },
    /// Takes them back.
    UnshareHyp {
        /// First page.
        pfn: u64,
        /// Number of pages.
        pages: u64,
    },
    /// Gives pages to a protected VM.
    DonateGuest {
        /// The VM.
        vm: VmHandle,
        /// First page.
        pfn: u64,
        /// Where the guest sees it.
        gfn: u64,
        /// Number of pages.
        pages: u64,
    },
    /// Lends pages to a VM that is not protected.
    ShareGuest {
        /// The VM.
        vm: VmHandle,
        /// First page.
        pfn: u64,
        /// Where the guest sees it.
        gfn: u64,
        /// Number of pages.
        pages: u64,
        /// What the guest may do.
        permissions: Permissions,
    },
    /// Takes them back.
    UnshareGuest {
        /// The VM.
        vm: VmHandle,
        /// First guest page.
        gfn: u64,
        /// Number of pages.
        pages: u64,
    },
    /// Takes pages back from a VM whose teardown has begun.
    ReclaimGuest {
        /// The VM.
        vm: VmHandle,
        /// First guest page.
        gfn: u64,
        /// Number of pages.
        pages: u64,
    },
    /// May the host access this page? The question that a gate asks before it maps content.
    QueryPage {
        /// The page.
        pfn: u64,
    },
    /// Takes private pages from protected guests that are alive, by force: the host gets them wiped, the guests
    /// find poison.
    ForceReclaim {
        /// First page.
        pfn: u64,
        /// Number of pages.
        pages: u64,
    },
    /// Makes a VM. Its root tables are two pages of the host, contiguous and aligned to 8 KiB, which come
    /// back at the end of its teardown.
    VmCreate {
        /// Its properties.
        flags: VmFlags,
        /// First page of the root.
        root: u64,
    },
    /// Makes a vCPU.
    VcpuCreate {
        /// The VM.
        vm: VmHandle,
        /// Its index.
        vcpu: u64,
    },
    /// Names the boot vCPU and its entry, once, before the VM's first run.
    VcpuSetBoot {
        /// The VM.
        vm: VmHandle,
        /// Its index.
        vcpu: u64,
        /// Where it starts.
        pc: u64,
        /// Its x0.
        x0: u64,
    },
    /// Runs a vCPU until its next exit.
    VcpuRun {
        /// The VM.
        vm: VmHandle,
        /// Its index.
        vcpu: u64,
        /// What the last exit asked for: the value of an MMIO load, or x0 to x3 of a forwarded call.
        values: [u64; 4],
    },
    /// Reads a register of a vCPU that is not protected.
    VcpuGetReg {
        /// The VM.
        vm: VmHandle,
        /// Its index.
        vcpu: u64,
        /// Which, see [`register`].
        register: u64,
    },
    /// Writes a register of a vCPU that is not protected.
    VcpuSetReg {
        /// The VM.
        vm: VmHandle,
        /// Its index.
        vcpu: u64,
        /// Which, see [`register`].
        register: u64,
        /// Its new value.
        value: u64,
    },
    /// Says that the pages of a vCPU's pending unshare are unmapped everywhere.
    UnshareAck {
        /// The VM.
        vm: VmHandle,
        /// Its index.
        vcpu: u64,
    },
    /// Begins the end of a VM: nothing of it runs any more.
    VmTeardownStart {
        /// The VM.
        vm: VmHandle,
    },
    /// Ends a VM that owns no page any more; call until nothing is left.
    VmTeardownFinish {
        /// The VM.
        vm: VmHandle,
    },
    /// Test builds: who owns a page?
    TestPage {
        /// The page.
        pfn: u64,
    },
    /// Test builds: counts all pages by owner.
    TestCensus,
    /// Test builds: the hypervisor pins a page that is shared with it.
    TestPin {
        /// The page.
        pfn: u64,
    },
    /// Test builds: the hypervisor lets go of it.
    TestUnpin {
        /// The page.
        pfn: u64,
    },
    /// Test builds: event counters.
    TestCounters,
    /// Test builds: the first page-table event from a number on; kind 0 if there is none yet.
    TestEvents {
        /// Events are numbered from 1.
        from: u64,
    },
    /// Test builds: the hypervisor breaks, so that one sees how it ends. Refused with [`Error::Invalid`] if there is no
    /// such kind or page.
    TestFail {
        /// A [`FailureKind`].
        kind: u64,
        /// A page, for [`FailureKind::Access`].
        pfn: u64,
    },
}

/// How the hypervisor breaks in [`HostCall::TestFail`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum FailureKind {
    /// It finds an invariant broken.
    Invariant = 0,
    /// It loads from a page at its physical address, where EL2 maps only what is its own.
    Access = 1,
    /// It calls itself without end.
    Stack = 2,
}

impl FailureKind {
    /// Reads the word.
    pub const fn from_word(word: u64) -> Option<Self> {
        Some(match word {
            0 => Self::Invariant,
            1 => Self::Access,
            2 => Self::Stack,
            _ => return None,
        })
    }
}

/// What a page-table event of [`HostCall::TestEvents`] is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum EventKind {
    /// A word of a table, or of a page that is about to be one, was changed.
    Write = 1,
    /// Translations of pages under a VMID were dropped.
    DropStage2 = 2,
    /// All translations under a VMID were dropped, for the last time.
    Retire = 3,
    /// Translations of EL2's own were dropped.
    DropHyp = 4,
    /// A page was wiped.
    Wipe = 5,
}

impl EventKind {
    /// Reads the word; `None` for 0, which is no event, and for what is no kind.
    pub const fn from_word(word: u64) -> Option<Self> {
        Some(match word {
            1 => Self::Write,
            2 => Self::DropStage2,
            3 => Self::Retire,
            4 => Self::DropHyp,
            5 => Self::Wipe,
            _ => return None,
        })
    }
}

/// Why registers are no call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DecodeError {
    /// No such function.
    UnknownFunction,
    /// An argument can never be right, whatever the state: a word that is no handle, flag set or pool.
    BadArgument(Error),
}

/// Registers that a call takes: x0 to x6.
pub const CALL_WORDS: usize = 7;
/// Registers that a result takes: x0 to x9.
pub const RESULT_WORDS: usize = 10;

impl HostCall {
    /// Decodes x0 to x6.
    pub fn decode(words: &[u64; CALL_WORDS]) -> Result<Self, DecodeError> {
        let [x0, a, b, c, d, e, f] = *words;
        let vm = || VmHandle::from_word(a).ok_or(DecodeError::BadArgument(Error::NoEntry));
        let invalid = DecodeError::BadArgument(Error::Invalid);
        let number = FunctionId::from_x0(x0).number().wrapping_sub(FIRST);
        Ok(match number {
            0x00 => Self::Version,
            0x01 => match Pool::from_word(a) {
                Some(pool @ (Pool::Tables | Pool::Metadata)) => Self::PoolTopUp { pool, pfn: b, pages: c },
                _ => return Err(invalid),
            },
            0x02 => Self::VmTopUp { vm: vm()?, pfn: b, pages: c },
            0x03 => Self::ShareHyp { pfn: a, pages: b },
            0x04 => Self::UnshareHyp { pfn: a, pages: b },
            0x05 => Self::DonateGuest { vm: vm()?, pfn: b, gfn: c, pages: d },
            0x06 => Self::ShareGuest {
                vm: vm()?,
                pfn: b,
                gfn: c,
                pages: d,
                permissions: Permissions::from_word(e).ok_or(invalid)?,
            },
            0x07 => Self::UnshareGuest { vm: vm()?, gfn: b, pages: c },
            0x08 => Self::ReclaimGuest { vm: vm()?, gfn: b, pages: c },
            0x09 => Self::QueryPage { pfn: a },
            0x0a => Self::ForceReclaim { pfn: a, pages: b },
            0x10 => Self::VmCreate { flags: VmFlags::from_word(a).ok_or(invalid)?, root: b },
            0x11 => Self::VcpuCreate { vm: vm()?, vcpu: b },
            0x12 => Self::VcpuSetBoot { vm: vm()?, vcpu: b, pc: c, x0: d },
            0x13 => Self::VcpuRun { vm: vm()?, vcpu: b, values: [c, d, e, f] },
            0x14 => Self::VcpuGetReg { vm: vm()?, vcpu: b, register: c },
            0x15 => Self::VcpuSetReg { vm: vm()?, vcpu: b, register: c, value: d },
            0x16 => Self::UnshareAck { vm: vm()?, vcpu: b },
            0x17 => Self::VmTeardownStart { vm: vm()? },
            0x18 => Self::VmTeardownFinish { vm: vm()? },
            0xf0 => Self::TestPage { pfn: a },
            0xf1 => Self::TestCensus,
            0xf2 => Self::TestPin { pfn: a },
            0xf3 => Self::TestUnpin { pfn: a },
            0xf4 => Self::TestCounters,
            0xf5 => Self::TestEvents { from: a },
            0xf6 => Self::TestFail { kind: a, pfn: b },
            _ => return Err(DecodeError::UnknownFunction),
        })
    }

    /// Whether only test builds serve it.
    pub const fn is_test(&self) -> bool {
        matches!(
            self,
            Self::TestPage { .. }
                | Self::TestCensus
                | Self::TestPin { .. }
                | Self::TestUnpin { .. }
                | Self::TestCounters
                | Self::TestEvents { .. }
                | Self::TestFail { .. }
        )
    }

    /// The values of x0 to x6.
    pub fn encode(self) -> [u64; CALL_WORDS] {
        let (number, arguments): (u32, [u64; CALL_WORDS - 1]) = match self {
            Self::Version => (0x00, [0; 6]),
            Self::PoolTopUp { pool, pfn, pages } => (0x01, [pool as u64, pfn, pages, 0, 0, 0]),
            Self::VmTopUp { vm, pfn, pages } => (0x02, [vm.to_word(), pfn, pages, 0, 0, 0]),
            Self::ShareHyp { pfn, pages } => (0x03, [pfn, pages, 0, 0, 0, 0]),
            Self::UnshareHyp { pfn, pages } => (0x04, [pfn, pages, 0, 0, 0, 0]),
            Self::DonateGuest { vm, pfn, gfn, pages } => (0x05, [vm.to_word(), pfn, gfn, pages, 0, 0]),
            Self::ShareGuest { vm, pfn, gfn, pages, permissions } => {
                (0x06, [vm.to_word(), pfn, gfn, pages, permissions.to_word(), 0])
            }
            Self::UnshareGuest { vm, gfn, pages } => (0x07, [vm.to_word(), gfn, pages, 0, 0, 0]),
            Self::ReclaimGuest { vm, gfn, pages } => (0x08, [vm.to_word(), gfn, pages, 0, 0, 0]),
            Self::QueryPage { pfn } => (0x09, [pfn, 0, 0, 0, 0, 0]),
            Self::ForceReclaim { pfn, pages } => (0x0a, [pfn, pages, 0, 0, 0, 0]),
            Self::VmCreate { flags, root } => (0x10, [flags.to_word(), root, 0, 0, 0, 0]),
            Self::VcpuCreate { vm, vcpu } => (0x11, [vm.to_word(), vcpu, 0, 0, 0, 0]),
            Self::VcpuSetBoot { vm, vcpu, pc, x0 } => (0x12, [vm.to_word(), vcpu, pc, x0, 0, 0]),
            Self::VcpuRun { vm, vcpu, values: [p, q, r, s] } => (0x13, [vm.to_word(), vcpu, p, q, r, s]),
            Self::VcpuGetReg { vm, vcpu, register } => (0x14, [vm.to_word(), vcpu, register, 0, 0, 0]),
            Self::VcpuSetReg { vm, vcpu, register, value } => {
                (0x15, [vm.to_word(), vcpu, register, value, 0, 0])
            }
            Self::UnshareAck { vm, vcpu } => (0x16, [vm.to_word(), vcpu, 0, 0, 0, 0]),
            Self::VmTeardownStart { vm } => (0x17, [vm.to_word(), 0, 0, 0, 0, 0]),
            Self::VmTeardownFinish { vm } => (0x18, [vm.to_word(), 0, 0, 0, 0, 0]),
            Self::TestPage { pfn } => (0xf0, [pfn, 0, 0, 0, 0, 0]),
            Self::TestCensus => (0xf1, [0; 6]),
            Self::TestPin { pfn } => (0xf2, [pfn, 0, 0, 0, 0, 0]),
            Self::TestUnpin { pfn } => (0xf3, [pfn, 0, 0, 0, 0, 0]),
            Self::TestCounters => (0xf4, [0; 6]),
            Self::TestEvents { from } => (0xf5, [from, 0, 0, 0, 0, 0]),
            Self::TestFail { kind, pfn } => (0xf6, [kind, pfn, 0, 0, 0, 0]),
        };
        let [a, b, c, d, e, f] = arguments;
        [u64::from(FIRST + number), a, b, c, d, e, f]
    }
}

/// What a served call returns: pages done even when it failed in the middle of a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostResult {
    /// 0 or why not.
    pub outcome: Result<(), Error>,
    /// x2 to x9.
    pub values: [u64; RESULT_WORDS - 2],
}

impl HostResult {
    /// A success that returns these values.
    pub fn ok(results: &[u64]) -> Self {
        let mut values = [0; RESULT_WORDS - 2];
        for (value, result) in values.iter_mut().zip(results) {
            *value = *result;
        }
        Self { outcome: Ok(()), values }
    }

    /// A refusal, which has done nothing.
    pub fn refused(error: Error) -> Self {
        Self { outcome: Err(error), ..Self::ok(&[]) }
    }

    /// Refused for lack of pages: `pages` of them to `pool` will do.
    pub fn lacking(pool: Pool, pages: u64) -> Self {
        Self { outcome: Err(Error::NoMemory), ..Self::ok(&[pages, pool as u64]) }
    }

    /// The values of x1 to x9.
    pub fn to_words(self) -> [u64; RESULT_WORDS - 1] {
        let mut words = [0; RESULT_WORDS - 1];
        let (first, rest) = words.split_at_mut(1);
        first.fill(match self.outcome {
            Ok(()) => 0,
            Err(error) => error.to_word(),
        });
        rest.copy_from_slice(&self.values);
        words
    }

    /// Reads x0 to x9; `None` if the call is not supported or the error is unknown.
    pub fn from_words(words: &[u64; RESULT_WORDS]) -> Option<Self> {
        let [x0, x1, values @ ..] = *words;
        if x0 != crate::smccc::SUCCESS {
            return None;
        }
        Some(Self { outcome: Error::from_word(x1)?, values })
    }

    /// State of the page, from the result of [`HostCall::QueryPage`].
    pub fn host_state(&self) -> Option<HostState> {
        HostState::from_word(self.values[0])
    }
}

impl From<Error> for HostResult {
    fn from(error: Error) -> Self {
        Self::refused(error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
