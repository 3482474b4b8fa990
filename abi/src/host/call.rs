//! A call of the host as a value, and its registers.

use super::{CALL_WORDS, FIRST};
use crate::error::Error;
use crate::page::{Permissions, Pool, VmFlags, VmHandle};
use crate::smccc::FunctionId;

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
        /// Which, see [`register`](super::register).
        register: u64,
    },
    /// Writes a register of a vCPU that is not protected.
    VcpuSetReg {
        /// The VM.
        vm: VmHandle,
        /// Its index.
        vcpu: u64,
        /// Which, see [`register`](super::register).
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
        /// A [`FailureKind`](super::FailureKind).
        kind: u64,
        /// A page, for [`FailureKind::Access`](super::FailureKind::Access).
        pfn: u64,
    },
}

/// Why registers are no call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DecodeError {
    /// No such function.
    UnknownFunction,
    /// An argument can never be right, whatever the state: a word that is no handle, flag set or pool.
    BadArgument(Error),
}

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
