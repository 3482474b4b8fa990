//! What the host tries in the middle of the story, with a guest alive: to give away, share, map or run what
//! it must not.

extern crate alloc;

use alloc::vec;
use alloc::vec::Vec;

use abi::page::{Permissions, Pool};
use abi::{Error, HostCall, VmHandle};
use guest_stub::protocol::{PAGE_SIZE, RAM_BASE};
use host_programs::Failure;
use host_programs::deed::Deed;
use host_programs::hostile::{Refusal, Watch, refusal, try_all};
use host_programs::steps::Steps;

/// What the host aims at.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Targets {
    /// The living protected VM.
    pub(crate) vm: VmHandle,
    /// A page with the secret, and where its guest sees it.
    pub(crate) secret: u64,
    /// Frame number of that page in the guest.
    pub(crate) secret_gfn: u64,
    /// A page of the hypervisor's.
    pub(crate) hyp: u64,
}

/// Frame number in the guest at which nothing is.
const EMPTY_GFN: u64 = 0x8_8000;
/// First frame number beyond a 40-bit guest address space.
const GFN_LIMIT: u64 = 1 << 28;
/// A page of a device: the UART.
const DEVICE_PFN: u64 = 0x9000;

/// Makes all the calls.
pub(crate) fn try_what_a_host_must_not_do(
    deed: &Deed,
    steps: &mut Steps,
    targets: &Targets,
) -> Result<(), Failure> {
    let spare = deed.alloc(1)?;
    let watch = Watch::new(&[targets.secret, targets.hyp, spare]);
    try_all(deed, steps, &watch, &with_good_arguments(targets, spare))?;
    try_all(deed, steps, &watch, &with_absurd_arguments(targets, spare))?;
    deed.free(spare, 1)
}

fn with_good_arguments(targets: &Targets, spare: u64) -> Vec<Refusal> {
    use Error::{Exists, NoEntry, Permission};
    let &Targets { vm, secret, secret_gfn, hyp } = targets;
    let all = Permissions::ALL;
    let donate = |pfn, gfn| HostCall::DonateGuest { vm, pfn, gfn, pages: 1 };
    let nobody = VmHandle::new(vm.slot(), vm.generation() + 1).unwrap_or(vm);
    vec![
        refusal("host-cannot-donate-the-guests-page-again", donate(secret, EMPTY_GFN), Permission),
        refusal("host-cannot-donate-the-hypervisors-page", donate(hyp, EMPTY_GFN), Permission),
        refusal("host-cannot-replace-a-page-of-the-guest", donate(spare, secret_gfn), Permission),
        refusal(
            "host-cannot-share-the-guests-page-with-the-hypervisor",
            HostCall::ShareHyp { pfn: secret, pages: 1 },
            Permission,
        ),
        refusal(
            "host-cannot-share-the-hypervisors-own-page",
            HostCall::ShareHyp { pfn: hyp, pages: 1 },
            Permission,
        ),
        refusal(
            "host-cannot-unshare-what-it-never-shared",
            HostCall::UnshareHyp { pfn: spare, pages: 1 },
            Permission,
        ),
        refusal(
            "host-cannot-put-the-guests-page-into-a-pool",
            HostCall::PoolTopUp { pool: Pool::Tables, pfn: secret, pages: 1 },
            Permission,
        ),
        refusal(
            "host-cannot-put-the-guests-page-into-its-own-tables",
            HostCall::VmTopUp { vm, pfn: secret, pages: 1 },
            Permission,
        ),
        refusal(
            "host-cannot-lend-a-page-to-a-protected-guest",
            HostCall::ShareGuest { vm, pfn: spare, gfn: EMPTY_GFN, pages: 1, permissions: all },
            Permission,
        ),
        refusal(
            "host-cannot-reclaim-from-a-living-guest",
            HostCall::ReclaimGuest { vm, gfn: secret_gfn, pages: 1 },
            Permission,
        ),
        refusal(
            "host-cannot-finish-a-teardown-that-it-has-not-begun",
            HostCall::VmTeardownFinish { vm },
            Permission,
        ),
        refusal(
            "host-cannot-set-the-entry-of-a-guest-that-has-run",
            HostCall::VcpuSetBoot { vm, vcpu: 0, pc: RAM_BASE, x0: 0 },
            Exists,
        ),
        refusal(
            "host-cannot-read-a-register-of-the-guest",
            HostCall::VcpuGetReg { vm, vcpu: 0, register: 0 },
            Permission,
        ),
        refusal(
            "host-cannot-write-a-register-of-the-guest",
            HostCall::VcpuSetReg { vm, vcpu: 0, register: abi::host::register::PC, value: 0 },
            Permission,
        ),
        refusal(
            "host-cannot-acknowledge-what-no-guest-asked",
            HostCall::UnshareAck { vm, vcpu: 0 },
            Permission,
        ),
        refusal("host-cannot-make-a-vcpu-twice", HostCall::VcpuCreate { vm, vcpu: 0 }, Exists),
        refusal(
            "host-cannot-run-a-vcpu-that-is-not-there",
            HostCall::VcpuRun { vm, vcpu: 3, values: [0; 4] },
            NoEntry,
        ),
        refusal(
            "host-cannot-run-a-vm-that-is-not-there",
            HostCall::VcpuRun { vm: nobody, vcpu: 0, values: [0; 4] },
            NoEntry,
        ),
    ]
}

fn with_absurd_arguments(targets: &Targets, spare: u64) -> Vec<Refusal> {
    use Error::{Invalid, NoEntry, Permission, Range};
    let &Targets { vm, .. } = targets;
    let donate = |pfn, gfn, pages| HostCall::DonateGuest { vm, pfn, gfn, pages };
    vec![
        refusal("host-cannot-donate-no-pages", donate(spare, EMPTY_GFN, 0), Invalid),
        refusal("host-cannot-donate-2-to-the-52-pages", donate(spare, EMPTY_GFN, 1 << 52), Invalid),
        refusal("host-cannot-donate-all-numbers-of-pages", donate(spare, EMPTY_GFN, u64::MAX), Invalid),
        refusal("host-cannot-donate-a-device", donate(DEVICE_PFN, EMPTY_GFN, 1), Permission),
        refusal("host-cannot-donate-beyond-all-memory", donate(u64::MAX, EMPTY_GFN, 1), Invalid),
        refusal("host-cannot-donate-beyond-the-guests-addresses", donate(spare, GFN_LIMIT, 1), Range),
        refusal(
            "host-cannot-run-vcpu-255",
            HostCall::VcpuRun { vm, vcpu: 255, values: [PAGE_SIZE; 4] },
            NoEntry,
        ),
        refusal(
            "host-cannot-run-vcpu-2-to-the-63",
            HostCall::VcpuRun { vm, vcpu: 1 << 63, values: [0; 4] },
            NoEntry,
        ),
    ]
}
