//! Things in the wrong order: shares, and the life of VMs from creation to the end of teardown.

use abi::Error::{Busy, Exists, NoEntry, Permission};
use abi::page::{Permissions, Pool};
use abi::{HostCall, HostState, VmFlags};
use host_programs::Failure;
use host_programs::deed::{Deed, Touch};
use host_programs::events::is_taken_before_it_is_given;
use host_programs::hostile::{Watch, refusal, try_all};
use host_programs::raw_vm::RawVm;
use host_programs::steps::Steps;

const PAGE_SIZE: u64 = 4096;
const GFN: u64 = 0x8_0000;
const PATTERN: u64 = 0x0bad_c0de_dead_beef;

/// Pages shared with the hypervisor.
pub(crate) fn shares(deed: &Deed, steps: &mut Steps) -> Result<(), Failure> {
    let page = deed.alloc(1)?;
    let watch = Watch::new(&[page]);
    let share = HostCall::ShareHyp { pfn: page, pages: 1 };
    let unshare = HostCall::UnshareHyp { pfn: page, pages: 1 };
    deed.must(share)?;
    state(deed, steps, "a-shared-page-is-lent", page, HostState::SharedOwned)?;
    let touch = deed.load(page * PAGE_SIZE)?;
    steps.check("a-shared-page-is-still-the-hosts-to-use", "done", touch, matches!(touch, Touch::Done(_)));
    let vm = RawVm::protected(deed)?;
    let donate = HostCall::DonateGuest { vm: vm.handle(), pfn: page, gfn: GFN, pages: 1 };
    try_all(
        deed,
        steps,
        &watch,
        &[
            refusal("share-of-a-shared-page", share, Permission),
            refusal("donation-of-a-shared-page", donate, Permission),
            refusal(
                "top-up-with-a-shared-page",
                HostCall::PoolTopUp { pool: Pool::Tables, pfn: page, pages: 1 },
                Permission,
            ),
        ],
    )?;
    vm.end(deed)?;
    if deed.call(HostCall::TestPin { pfn: page })?.ok().is_some() {
        let busy = [refusal("unshare-of-a-pinned-page", unshare, Busy)];
        try_all(deed, steps, &watch, &busy)?;
        deed.must(HostCall::TestUnpin { pfn: page })?;
        let unpin = HostCall::TestUnpin { pfn: page };
        try_all(deed, steps, &watch, &[refusal("unpin-of-a-page-that-is-not-pinned", unpin, Permission)])?;
    } else {
        for step in ["unshare-of-a-pinned-page", "unpin-of-a-page-that-is-not-pinned"] {
            steps.skip(step, "this build of the hypervisor has no test calls");
        }
    }
    deed.must(unshare)?;
    state(deed, steps, "an-unshared-page-is-the-hosts-alone", page, HostState::Owned)?;
    try_all(deed, steps, &watch, &[refusal("unshare-of-an-unshared-page", unshare, Permission)])?;
    deed.free(page, 1)
}

fn state(deed: &Deed, steps: &mut Steps, step: &str, pfn: u64, expected: HostState) -> Result<(), Failure> {
    let observed = deed.query(pfn)?;
    let shown = |state| host_programs::steps::format(format_args!("{state:?}"));
    steps.check(step, shown(Some(expected)), shown(observed), observed == Some(expected));
    Ok(())
}

/// A page given to a pool is the hypervisor's for good.
pub(crate) fn pools(deed: &Deed, steps: &mut Steps) -> Result<(), Failure> {
    let page = deed.alloc(1)?;
    let at = page * PAGE_SIZE + 16;
    deed.top_up(Pool::Tables, page, 1)?;
    state(deed, steps, "a-page-in-a-pool-is-no-page-of-the-hosts", page, HostState::NoPage)?;
    let touch = deed.store(at, PATTERN)?;
    steps.check("touch-of-a-page-in-a-pool-aborts", "abort", touch, touch.is_injected_abort(at));
    let top_up = HostCall::PoolTopUp { pool: Pool::Metadata, pfn: page, pages: 1 };
    let rows = [
        refusal("second-top-up-with-a-page", top_up, Permission),
        refusal("share-of-a-page-in-a-pool", HostCall::ShareHyp { pfn: page, pages: 1 }, Permission),
    ];
    try_all(deed, steps, &Watch::new(&[page]), &rows)
}

/// Reads from the hypervisor's ring of events in which order it gave a page away.
fn order_of_a_donation(deed: &Deed, steps: &mut Steps, from: u64, page: u64) -> Result<(), Failure> {
    const STEP: &str = "a-page-is-gone-from-tables-and-tlbs-before-the-guest-has-it";
    let at = page * PAGE_SIZE;
    let events = deed.events(from)?;
    if events.is_empty() {
        steps.skip(STEP, "this build of the hypervisor has no test calls");
        return Ok(());
    }
    // A table that is split is written entry by entry: the end tells the story.
    events.iter().skip(events.len().saturating_sub(8)).for_each(|event| steps.tell(event));
    let observed = if is_taken_before_it_is_given(&events, at) { "in order" } else { "out of order" };
    steps.check(STEP, "in order", observed, observed == "in order");
    Ok(())
}

/// The life of a protected VM.
pub(crate) fn protected_vm(deed: &Deed, steps: &mut Steps) -> Result<(), Failure> {
    let mut raw = RawVm::protected(deed)?;
    raw.vcpu(deed, 0)?;
    let vm = raw.handle();
    let first = deed.alloc(3)?;
    let page = first + 1;
    let at = page * PAGE_SIZE + 8;
    deed.store(at, PATTERN)?;
    let before = deed.events(0)?.last().map_or(0, |event| event.number);
    raw.must(deed, HostCall::DonateGuest { vm, pfn: page, gfn: GFN, pages: 1 })?;
    order_of_a_donation(deed, steps, before + 1, page)?;
    state(deed, steps, "a-donated-page-is-no-page-of-the-hosts", page, HostState::NoPage)?;
    let touch = deed.load(at)?;
    steps.check("touch-of-a-donated-page-aborts", "abort", touch, touch.is_injected_abort(at));

    let watch = Watch::new(&[first, page, page + 1]);
    let donate = |pfn, gfn| HostCall::DonateGuest { vm, pfn, gfn, pages: 1 };
    let range = |pfn| HostCall::DonateGuest { vm, pfn, gfn: GFN + 8, pages: 2 };
    let reclaim = HostCall::ReclaimGuest { vm, gfn: GFN, pages: 1 };
    let (start, finish) = (HostCall::VmTeardownStart { vm }, HostCall::VmTeardownFinish { vm });
    let boot = HostCall::VcpuSetBoot { vm, vcpu: 0, pc: GFN * PAGE_SIZE, x0: 0 };
    let run = HostCall::VcpuRun { vm, vcpu: 0, values: [0; 4] };
    deed.must(boot)?;
    try_all(
        deed,
        steps,
        &watch,
        &[
            refusal("donation-of-a-donated-page", donate(page, GFN + 1), Permission),
            refusal("donation-over-a-donated-page", donate(page + 1, GFN), Permission),
            refusal("share-of-a-donated-page", HostCall::ShareHyp { pfn: page, pages: 1 }, Permission),
            refusal("donation-of-a-range-that-begins-with-a-donated-page", range(page), Permission),
            refusal("donation-of-a-range-that-ends-with-a-donated-page", range(first), Permission),
            refusal("second-choice-of-the-boot-vcpu", boot, Exists),
            refusal("reclaim-before-the-teardown", reclaim, Permission),
            refusal("end-before-the-teardown", finish, Permission),
        ],
    )?;

    deed.must(start)?;
    try_all(
        deed,
        steps,
        &watch,
        &[
            refusal("second-begin-of-a-teardown", start, Permission),
            refusal("donation-to-a-dying-vm", donate(page + 1, GFN + 1), Permission),
            refusal("vcpu-for-a-dying-vm", HostCall::VcpuCreate { vm, vcpu: 1 }, Permission),
            refusal("run-of-a-dying-vm", run, Permission),
            refusal(
                "force-on-a-page-of-a-dying-vm",
                HostCall::ForceReclaim { pfn: page, pages: 1 },
                Permission,
            ),
            refusal("end-with-a-page-that-is-not-reclaimed", finish, Busy),
            refusal(
                "reclaim-where-nothing-is",
                HostCall::ReclaimGuest { vm, gfn: GFN + 1, pages: 1 },
                NoEntry,
            ),
        ],
    )?;

    deed.must(reclaim)?;
    let wiped = deed.load(at)?;
    steps.check("a-reclaimed-page-is-wiped", Touch::Done(0), wiped, wiped == Touch::Done(0));
    state(deed, steps, "a-reclaimed-page-is-the-hosts-alone", page, HostState::Owned)?;
    try_all(deed, steps, &watch, &[refusal("second-reclaim-of-a-page", reclaim, NoEntry)])?;
    deed.free(first, 3)?;
    raw.finish(deed)?;

    let next = RawVm::protected(deed)?;
    steps.check(
        "a-handle-is-never-used-again",
        "another",
        format_args!("{:?} after {vm:?}", next.handle()),
        next.handle() != vm,
    );
    let nothing = Watch::new(&[]);
    try_all(
        deed,
        steps,
        &nothing,
        &[
            refusal("run-of-an-ended-vm", run, NoEntry),
            refusal("begin-of-the-teardown-of-an-ended-vm", start, NoEntry),
            refusal("end-of-an-ended-vm", finish, NoEntry),
            refusal("reclaim-from-an-ended-vm", reclaim, NoEntry),
        ],
    )?;
    next.end(deed)
}

/// VMs without protection.
pub(crate) fn plain_vms(deed: &Deed, steps: &mut Steps) -> Result<(), Failure> {
    let mut first = RawVm::new(deed, VmFlags::default())?;
    let mut second = RawVm::new(deed, VmFlags::default())?;
    let protected = RawVm::protected(deed)?;
    first.vcpu(deed, 0)?;
    let page = deed.alloc(2)?;
    let watch = Watch::new(&[page, page + 1]);
    let permissions = Permissions::ALL;
    let lend = |vm, pfn| HostCall::ShareGuest { vm, pfn, gfn: GFN, pages: 1, permissions };
    let take = |vm| HostCall::UnshareGuest { vm, gfn: GFN, pages: 1 };
    first.must(deed, lend(first.handle(), page))?;
    state(deed, steps, "a-lent-page-is-still-the-hosts", page, HostState::SharedOwned)?;
    let touch = deed.store(page * PAGE_SIZE, PATTERN)?;
    steps.check("the-host-may-write-to-a-lent-page", "done", touch, matches!(touch, Touch::Done(_)));
    let vm = first.handle();
    try_all(
        deed,
        steps,
        &watch,
        &[
            refusal("loan-over-a-lent-page", lend(vm, page + 1), Permission),
            refusal(
                "donation-of-a-lent-page",
                HostCall::DonateGuest { vm: protected.handle(), pfn: page, gfn: GFN, pages: 1 },
                Permission,
            ),
            refusal("share-of-a-lent-page", HostCall::ShareHyp { pfn: page, pages: 1 }, Permission),
            refusal(
                "register-that-is-not",
                HostCall::VcpuGetReg { vm, vcpu: 0, register: 1 << 40 },
                abi::Error::Invalid,
            ),
            refusal(
                "change-of-a-register-that-is-not",
                HostCall::VcpuSetReg { vm, vcpu: 0, register: 63, value: 0 },
                abi::Error::Invalid,
            ),
            refusal(
                "processor-state-of-el2",
                HostCall::VcpuSetReg { vm, vcpu: 0, register: abi::host::register::PSTATE, value: 0x3c9 },
                abi::Error::Invalid,
            ),
        ],
    )?;
    let mut wrong = 0;
    for register in (0..=31).chain(33..=34).chain(64..=86) {
        // In processor state and the like only what a guest may have would be taken: those are not among them.
        let value = 0x1234_5678_0000_0000 | register;
        deed.must(HostCall::VcpuSetReg { vm, vcpu: 0, register, value })?;
        let [read, ..] = deed.must(HostCall::VcpuGetReg { vm, vcpu: 0, register })?;
        wrong += u64::from(read != value);
    }
    steps.equal("every-register-of-an-open-vm-reads-as-it-was-written", 0, wrong);
    second.must(deed, lend(second.handle(), page))?;
    deed.must(take(vm))?;
    let name = "a-page-lent-to-two-vms-is-still-lent-when-one-loan-ends";
    state(deed, steps, name, page, HostState::SharedOwned)?;
    try_all(
        deed,
        steps,
        &watch,
        &[
            refusal("second-end-of-a-loan", take(vm), NoEntry),
            refusal(
                "donation-of-a-page-that-another-vm-borrows",
                HostCall::DonateGuest { vm: protected.handle(), pfn: page, gfn: GFN, pages: 1 },
                Permission,
            ),
        ],
    )?;
    deed.must(take(second.handle()))?;
    state(deed, steps, "a-page-whose-loan-has-ended-is-the-hosts-alone", page, HostState::Owned)?;

    second.must(deed, lend(second.handle(), page))?;
    let handle = second.handle();
    deed.must(HostCall::VmTeardownStart { vm: handle })?;
    let finish = HostCall::VmTeardownFinish { vm: handle };
    try_all(deed, steps, &watch, &[refusal("end-with-a-lent-page", finish, Busy)])?;
    deed.must(take(handle))?;
    second.finish(deed)?;
    deed.free(page, 2)?;
    first.end(deed)?;
    protected.end(deed)
}
