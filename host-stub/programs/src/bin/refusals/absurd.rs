//! Every call with arguments that can never be right. The expected errors stand in one table, as the
//! interface's documents give them: what can never be a range, flag set or pool is `Invalid`, no handle is
//! `NoEntry`, what is no memory that may change hands is `Permission`.

extern crate alloc;

use alloc::vec;
use alloc::vec::Vec;

use abi::Error::{Again, Invalid, NoEntry, Permission, Range};
use abi::host::{CALLS, FIRST};
use abi::page::{Permissions, Pool};
use abi::{HostCall, VmFlags, VmHandle};
use host_programs::Failure;
use host_programs::deed::Deed;
use host_programs::hostile::{self, Expected, Refusal, Watch, raw_refusal, refusal};
use host_programs::raw_vm::RawVm;
use host_programs::steps::{Steps, format};

/// The UART's page.
const DEVICE: u64 = 0x9000;
/// A page of flash.
const FLASH: u64 = 0x10;
/// A guest page where nothing is.
const GFN: u64 = 0x8_0000;
/// First page beyond a guest's 40 bits.
const GFN_LIMIT: u64 = 1 << 28;
/// First page that no physical address reaches.
const PFN_LIMIT: u64 = 1 << 40;

pub(crate) fn try_all(deed: &Deed, steps: &mut Steps, hyp: u64) -> Result<(), Failure> {
    let mut vm = RawVm::protected(deed)?;
    vm.vcpu(deed, 0)?;
    let plain = RawVm::new(deed, VmFlags::default())?;
    let spare = deed.alloc(2)?;
    let watch = Watch::new(&[spare, spare + 1, hyp, vm.root(), plain.root()]);
    let scene = Scene { vm: vm.handle(), plain: plain.handle(), spare, hyp, root: vm.root() };

    hostile::try_all(deed, steps, &watch, &scene.pages())?;
    hostile::try_all(deed, steps, &watch, &scene.guest_pages())?;
    hostile::try_all(deed, steps, &watch, &scene.objects())?;
    let handles = stale_handles(vm.handle());
    every_call_with_no_handle(deed, steps, &watch, &handles)?;

    deed.free(spare, 2)?;
    vm.end(deed)?;
    plain.end(deed)
}

struct Scene {
    vm: VmHandle,
    plain: VmHandle,
    spare: u64,
    hyp: u64,
    root: u64,
}

impl Scene {
    /// Ranges of physical pages.
    fn pages(&self) -> Vec<Refusal> {
        let &Self { vm, spare, hyp, root, .. } = self;
        let share = |pfn, pages| HostCall::ShareHyp { pfn, pages };
        let unshare = |pfn, pages| HostCall::UnshareHyp { pfn, pages };
        let tables = |pfn, pages| HostCall::PoolTopUp { pool: Pool::Tables, pfn, pages };
        let records = |pfn, pages| HostCall::PoolTopUp { pool: Pool::Metadata, pfn, pages };
        let vm_tables = |pfn, pages| HostCall::VmTopUp { vm, pfn, pages };
        let force = |pfn, pages| HostCall::ForceReclaim { pfn, pages };
        vec![
            refusal("share-of-no-pages", share(spare, 0), Invalid),
            refusal("share-of-2-to-the-52-pages", share(spare, 1 << 52), Invalid),
            refusal("share-of-all-numbers-of-pages", share(spare, u64::MAX), Invalid),
            refusal("share-beyond-the-end-of-memory", share(spare, 1 << 24), Invalid),
            refusal("share-that-wraps", share(u64::MAX, 2), Invalid),
            refusal("share-beyond-physical-addresses", share(PFN_LIMIT, 1), Invalid),
            refusal("share-of-a-device", share(DEVICE, 1), Permission),
            refusal("share-of-flash", share(FLASH, 1), Permission),
            refusal("share-of-the-hypervisor", share(hyp, 1), Permission),
            refusal("share-of-a-vms-root", share(root, 1), Permission),
            refusal("unshare-of-no-pages", unshare(spare, 0), Invalid),
            refusal("unshare-of-2-to-the-52-pages", unshare(spare, 1 << 52), Invalid),
            refusal("unshare-of-what-is-not-shared", unshare(spare, 1), Permission),
            refusal("unshare-of-the-hypervisor", unshare(hyp, 1), Permission),
            refusal("top-up-of-tables-with-no-pages", tables(spare, 0), Invalid),
            refusal("top-up-of-tables-with-2-to-the-52-pages", tables(spare, 1 << 52), Invalid),
            refusal("top-up-of-tables-with-the-hypervisor", tables(hyp, 1), Permission),
            refusal("top-up-of-tables-with-a-device", tables(DEVICE, 1), Permission),
            refusal("top-up-of-tables-with-a-vms-root", tables(root, 1), Permission),
            refusal("top-up-of-records-with-no-pages", records(spare, 0), Invalid),
            refusal("top-up-of-records-with-the-hypervisor", records(hyp, 1), Permission),
            refusal("top-up-of-a-vm-with-no-pages", vm_tables(spare, 0), Invalid),
            refusal("top-up-of-a-vm-with-all-numbers-of-pages", vm_tables(spare, u64::MAX), Invalid),
            refusal("top-up-of-a-vm-with-the-hypervisor", vm_tables(hyp, 1), Permission),
            refusal("top-up-of-a-vm-with-its-own-root", vm_tables(root, 1), Permission),
            raw_refusal(
                "top-up-of-a-pool-that-is-not",
                words(0x01, [7, spare, 1, 0]),
                Expected::Error(Invalid),
            ),
            raw_refusal(
                "top-up-of-a-vms-pool-without-vm",
                words(0x01, [2, spare, 1, 0]),
                Expected::Error(Invalid),
            ),
            refusal("force-on-no-pages", force(spare, 0), Invalid),
            refusal("force-on-all-numbers-of-pages", force(spare, u64::MAX), Invalid),
            refusal("force-beyond-physical-addresses", force(PFN_LIMIT, 1), Invalid),
            refusal("force-on-a-device", force(DEVICE, 1), Permission),
            refusal("force-on-the-hypervisor", force(hyp, 1), Permission),
            refusal("force-on-a-vms-root", force(root, 1), Permission),
            refusal("force-on-the-hosts-own-page", force(spare, 1), Again),
            refusal("question-beyond-physical-addresses", HostCall::QueryPage { pfn: PFN_LIMIT }, Invalid),
            refusal("question-about-all-ones", HostCall::QueryPage { pfn: u64::MAX }, Invalid),
        ]
    }

    /// Ranges of pages for and of guests.
    fn guest_pages(&self) -> Vec<Refusal> {
        let &Self { vm, plain, spare, hyp, root } = self;
        let donate = |pfn, gfn, pages| HostCall::DonateGuest { vm, pfn, gfn, pages };
        let permissions = Permissions::ALL;
        let lend = |vm, pfn, gfn, pages| HostCall::ShareGuest { vm, pfn, gfn, pages, permissions };
        let take = |vm, gfn, pages| HostCall::UnshareGuest { vm, gfn, pages };
        let reclaim = |vm, gfn, pages| HostCall::ReclaimGuest { vm, gfn, pages };
        vec![
            refusal("donation-of-no-pages", donate(spare, GFN, 0), Invalid),
            refusal("donation-of-2-to-the-52-pages", donate(spare, GFN, 1 << 52), Invalid),
            refusal("donation-of-all-numbers-of-pages", donate(spare, GFN, u64::MAX), Invalid),
            refusal("donation-beyond-the-end-of-memory", donate(spare, GFN, 1 << 24), Invalid),
            refusal("donation-of-a-device", donate(DEVICE, GFN, 1), Permission),
            refusal("donation-of-flash", donate(FLASH, GFN, 1), Permission),
            refusal("donation-of-the-hypervisor", donate(hyp, GFN, 1), Permission),
            refusal("donation-of-a-vms-root", donate(root, GFN, 1), Permission),
            refusal("donation-beyond-the-guests-addresses", donate(spare, GFN_LIMIT, 1), Range),
            refusal("donation-over-the-end-of-the-guests-addresses", donate(spare, GFN_LIMIT - 1, 2), Range),
            refusal("donation-at-all-ones", donate(spare, u64::MAX, 1), Invalid),
            refusal(
                "donation-to-a-vm-without-protection",
                HostCall::DonateGuest { vm: plain, pfn: spare, gfn: GFN, pages: 1 },
                Permission,
            ),
            refusal("loan-to-a-protected-vm", lend(vm, spare, GFN, 1), Permission),
            refusal("loan-of-no-pages", lend(plain, spare, GFN, 0), Invalid),
            refusal("loan-of-2-to-the-52-pages", lend(plain, spare, GFN, 1 << 52), Invalid),
            refusal("loan-of-the-hypervisor", lend(plain, hyp, GFN, 1), Permission),
            refusal("loan-of-a-device", lend(plain, DEVICE, GFN, 1), Permission),
            refusal("loan-beyond-the-guests-addresses", lend(plain, spare, GFN_LIMIT, 1), Range),
            raw_refusal(
                "loan-with-an-unknown-permission",
                words(0x06, [plain.to_word(), spare, GFN, 1]).with(5, 4),
                Expected::Error(Invalid),
            ),
            refusal("end-of-a-loan-that-is-not", take(plain, GFN, 1), NoEntry),
            refusal("end-of-a-loan-of-no-pages", take(plain, GFN, 0), Invalid),
            refusal("end-of-a-loan-of-2-to-the-52-pages", take(plain, GFN, 1 << 52), Invalid),
            refusal("end-of-a-loan-to-a-protected-vm", take(vm, GFN, 1), Permission),
            refusal("reclaim-from-a-living-vm", reclaim(vm, GFN, 1), Permission),
            refusal("reclaim-of-no-pages", reclaim(vm, GFN, 0), Invalid),
            refusal("reclaim-of-all-numbers-of-pages", reclaim(vm, GFN, u64::MAX), Invalid),
            refusal("reclaim-from-a-vm-without-protection", reclaim(plain, GFN, 1), Permission),
        ]
    }

    /// VMs, vCPUs and registers.
    fn objects(&self) -> Vec<Refusal> {
        let &Self { vm, plain, spare, hyp, .. } = self;
        let flags = VmFlags { protected: true, ..VmFlags::default() };
        let create = |root| HostCall::VmCreate { flags, root };
        let vcpu = |vcpu| HostCall::VcpuCreate { vm, vcpu };
        let run = |vcpu| HostCall::VcpuRun { vm, vcpu, values: [u64::MAX; 4] };
        let boot = |vcpu, pc| HostCall::VcpuSetBoot { vm, vcpu, pc, x0: 0 };
        vec![
            raw_refusal("vm-with-an-unknown-flag", words(0x10, [8, spare, 0, 0]), Expected::Error(Invalid)),
            raw_refusal("vm-with-all-flags", words(0x10, [u64::MAX, spare, 0, 0]), Expected::Error(Invalid)),
            refusal("vm-with-an-unaligned-root", create(spare | 1), Invalid),
            refusal("vm-with-a-root-beyond-physical-addresses", create(PFN_LIMIT), Invalid),
            refusal("vm-with-a-root-in-a-device", create(DEVICE), Permission),
            refusal("vm-with-a-root-in-the-hypervisor", create(hyp & !1), Permission),
            refusal("vm-with-another-vms-root", create(self.root), Permission),
            refusal("vcpu-that-is-there", vcpu(0), abi::Error::Exists),
            refusal("vcpu-out-of-order", vcpu(5), Invalid),
            refusal("vcpu-255", vcpu(255), Invalid),
            refusal("vcpu-with-all-ones", vcpu(u64::MAX), Invalid),
            refusal("run-before-the-boot-vcpu-is-chosen", run(0), abi::Error::Again),
            refusal("run-of-a-vcpu-that-is-not", run(1), NoEntry),
            refusal("run-of-vcpu-255", run(255), NoEntry),
            refusal("run-of-vcpu-with-all-ones", run(u64::MAX), NoEntry),
            refusal("boot-of-a-vcpu-that-is-not", boot(1, 0x8000_0000), NoEntry),
            refusal("boot-at-an-unaligned-address", boot(0, 0x8000_0002), Invalid),
            refusal(
                "register-of-a-protected-vcpu",
                HostCall::VcpuGetReg { vm, vcpu: 0, register: 0 },
                Permission,
            ),
            refusal(
                "change-of-a-register-of-a-protected-vcpu",
                HostCall::VcpuSetReg { vm, vcpu: 0, register: 31, value: 0 },
                Permission,
            ),
            refusal("register-of-no-vcpu", HostCall::VcpuGetReg { vm: plain, vcpu: 0, register: 0 }, NoEntry),
            refusal("acknowledgement-of-nothing", HostCall::UnshareAck { vm, vcpu: 0 }, Permission),
            refusal("acknowledgement-for-no-vcpu", HostCall::UnshareAck { vm, vcpu: 7 }, NoEntry),
            refusal("end-of-a-teardown-that-has-not-begun", HostCall::VmTeardownFinish { vm }, Permission),
        ]
    }
}

/// Registers of call `number`.
fn words(number: u32, [a, b, c, d]: [u64; 4]) -> [u64; abi::host::CALL_WORDS] {
    [u64::from(FIRST + number), a, b, c, d, 0, 0]
}

trait With {
    fn with(self, index: usize, value: u64) -> Self;
}

impl With for [u64; abi::host::CALL_WORDS] {
    fn with(mut self, index: usize, value: u64) -> Self {
        if let Some(word) = self.get_mut(index) {
            *word = value;
        }
        self
    }
}

/// Words that are no handle, or that of a VM that is not.
fn stale_handles(living: VmHandle) -> [u64; 7] {
    let word = living.to_word();
    [0, u64::MAX, 1 << 32 | word, word + (1 << 8), word & 0xff, word ^ 0x80, u64::from(u32::MAX)]
}

/// Every call that takes a VM, with each of these words for it: one step for each call.
fn every_call_with_no_handle(
    deed: &Deed,
    steps: &mut Steps,
    watch: &Watch,
    handles: &[u64],
) -> Result<(), Failure> {
    for call in CALLS.iter().filter(|call| call.arguments.first() == Some(&"vm")) {
        let refused = hostile::count_refused(
            deed,
            watch,
            handles.iter().map(|handle| [u64::from(call.number), *handle, 1, 4, 4, 0, 0]),
            Expected::Error(NoEntry),
        )?;
        let name = call.name.to_ascii_lowercase().replace('_', "-");
        let step = format(format_args!("{name}-without-a-vm"));
        steps.equal(&step, handles.len(), refused);
    }
    Ok(())
}
