//! Transitions that are wrong on purpose: the oracle must find each, and tell it. That it finds nothing where nothing
//! is wrong is what all other tests show, which run with it.

use crate::addr::{Gfn, Pages, Pfn};
use crate::machine::Machine;
use crate::ownership::{Error, Host, HypSpace, donate, reclaim, share};
use crate::pgtable::hyp_stage1::{Mapped, Rights};
use crate::pgtable::stage2::{Entry, Owner, Page, Sharing};
use crate::testing::{PROTECTED, RAM_START, TestMachine, World};
use crate::vm::Vm;
use crate::watch::{Answer, Asked, Held, Watch};
use abi::VmHandle;
use abi::host::HostCall;
use abi::page::Permissions;
use std::panic::{AssertUnwindSafe, catch_unwind};

const GFN: u64 = 0x8_0000;

fn ram(first: u64, count: u64) -> Pages<Pfn> {
    Pages::from_raw(RAM_START + first, count).unwrap()
}

fn guest(first: u64, count: u64) -> Pages<Gfn> {
    Pages::from_raw(GFN + first, count).unwrap()
}

/// The host's entry for its own page, lent or not.
fn of_host(page: u64, sharing: Sharing) -> Entry {
    Entry::Page(Page { pfn: ram(page, 1).start(), sharing, permissions: Permissions::ALL })
}

/// Overwrites an entry of the host's table.
fn set_host(machine: &TestMachine, host: &mut Host, page: u64, entry: Entry) {
    host.table.set(machine, ram(page, 1).identity(), &mut host.pool, entry);
}

/// Maps a page at EL2.
fn set_hyp(machine: &TestMachine, host: &mut Host, hyp: &mut HypSpace, page: u64, rights: Rights) {
    let mapped = Some(Mapped { pfn: ram(page, 1).start(), rights });
    hyp.table.set(machine, ram(page, 1).identity_va(), &mut host.pool, mapped);
}

/// The oracle's report about what `f` does.
fn report(f: impl FnOnce()) -> String {
    let panic = catch_unwind(AssertUnwindSafe(f)).expect_err("the oracle says nothing");
    panic.downcast_ref::<String>().expect("a text").clone()
}

/// The report about a transition of host and hypervisor.
fn of_host_and_hyp(
    world: &World,
    asked: Asked,
    wrong: impl FnOnce(&TestMachine, &mut Host, &mut HypSpace) -> Result<u64, Error>,
) -> String {
    report(|| {
        let _ = world.hyp.with_host_and_hyp(asked, |host, hyp| wrong(world.hyp.machine(), host, hyp));
    })
}

/// The report about a transition of host and guest.
fn of_host_and_guest(
    world: &World,
    vm: VmHandle,
    asked: Asked,
    wrong: impl FnOnce(&TestMachine, &mut Host, &mut Vm) -> Result<u64, Error>,
) -> String {
    report(|| {
        let mut host = world.hyp.host.lock();
        let mut vm = world.hyp.vms.lock(vm).unwrap();
        let watch = Watch::begin(&world.hyp, asked, Held { host: Some(&host), hyp: None, vm: Some(&vm) });
        let result = wrong(world.hyp.machine(), &mut host, &mut vm);
        watch.end(&world.hyp, Held { host: Some(&host), hyp: None, vm: Some(&vm) }, Answer::from(&result));
    })
}

/// A VM that has three pages of RAM from page 4 on.
fn donated(world: &World) -> VmHandle {
    let vm = world.protected_vm();
    world.ok(HostCall::DonateGuest { vm, pfn: RAM_START + 4, gfn: GFN, pages: 3 });
    vm
}

#[test]
fn a_difference_is_told_in_calls_and_pages() {
    let world = World::new();
    let text = of_host_and_hyp(&world, Asked::ShareHyp(ram(4, 3)), |machine, host, hyp| {
        set_host(machine, host, 3, Entry::Owned(Owner::Hyp));
        set_host(machine, host, 4, of_host(4, Sharing::SharedWithHyp));
        set_host(machine, host, 6, of_host(6, Sharing::SharedWithHyp));
        set_hyp(machine, host, hyp, 6, Rights::ReadWrite);
        Ok(2)
    });
    assert_eq!(
        text,
        "broken invariant: core and specification disagree over SHARE_HYP of pages 0x40004 to 0x40006\n  \
         outcome: specification: done, 3 pages; core: done, 2 pages\n  \
         page 0x40003: before: the host's alone; specification: the host's alone; core: the hypervisor's\n  \
         page 0x40005: before: the host's alone; specification: the host's, lent to the hypervisor; core: the \
         host's alone\n  \
         page 0x40006 at EL2: specification: not mapped; core: mapped\n "
    );
}

#[test]
fn a_difference_at_a_guest_is_told_in_its_pages() {
    let world = World::new();
    let vm = donated(&world);
    let asked = Asked::Share(vm, guest(1, 1));
    let text = of_host_and_guest(&world, vm, asked, |machine, host, _| {
        set_host(machine, host, 5, of_host(5, Sharing::Borrowed));
        set_host(machine, host, 6, of_host(6, Sharing::Owned));
        Err(Error::Missing(guest(1, 1).start()))
    });
    assert_eq!(
        text,
        "broken invariant: core and specification disagree over MEM_SHARE of vm0.1: guest page 0x80001\n  \
         outcome: specification: done, 1 page; core: MissingPage\n  \
         page 0x40006: before: vm0.1's alone, as guest page 0x80002; specification: vm0.1's alone, as guest page \
         0x80002; core: the host's alone\n  \
         guest page 0x80001: before: page 0x40005, its own; specification: page 0x40005, shared with the host; \
         core: page 0x40005, its own\n "
    );
}

#[test]
fn many_differences_are_counted() {
    let world = World::new();
    let text = of_host_and_hyp(&world, Asked::ShareHyp(ram(0x400, 0x200)), |_, _, _| Ok(0x200));
    assert_eq!(text.lines().count(), 15, "{text}");
    assert!(text.ends_with("and 500 differences more\n "), "{text}");
}

#[test]
fn a_refusal_that_changes_something_is_found() {
    let world = World::new();
    let vm = donated(&world);
    let text = of_host_and_hyp(&world, Asked::ShareHyp(ram(4, 1)), |machine, host, _| {
        set_host(machine, host, 4, of_host(4, Sharing::SharedWithHyp));
        Err(Error::HostState(ram(4, 1).start()))
    });
    assert!(
        text.contains("page 0x40004: before: vm0's alone, as a guest page that ends in 0x0000;"),
        "{text}"
    );
    assert!(!text.contains("outcome"), "{text}");
    let _ = vm;
}

#[test]
fn a_page_that_comes_back_unwiped_is_found() {
    let world = World::new();
    let vm = donated(&world);
    world.fill(5);
    world.ok(HostCall::VmTeardownStart { vm });
    let asked = Asked::ReclaimGuest(vm, guest(0, 3));
    let text = of_host_and_guest(&world, vm, asked, |machine, host, vm| {
        let result = reclaim::from_dying(machine, host, &mut vm.space, guest(0, 3));
        world.fill(5);
        result
    });
    assert!(text.contains("\n  page 0x40005: specification: wiped; core: it holds something\n"), "{text}");
    assert_eq!(text.lines().count(), 3, "{text}");
}

#[test]
fn a_count_that_is_forgotten_is_found() {
    let world = World::new();
    let vm = world.protected_vm();
    let asked = Asked::DonateGuest(vm, ram(4, 2), guest(0, 2));
    let text = of_host_and_guest(&world, vm, asked, |machine, host, vm| {
        let memory = &world.hyp.memory;
        let result = donate::host_to_guest(machine, memory, host, &mut vm.space, ram(4, 2), guest(0, 2));
        vm.space.pages -= 1;
        result
    });
    assert!(text.contains("\n  pages of the VM: specification: 2; core: 1\n"), "{text}");
}

#[test]
fn a_guest_that_gets_its_pages_in_the_wrong_order_is_found() {
    let world = World::new();
    let vm = world.protected_vm();
    let asked = Asked::DonateGuest(vm, ram(4, 2), guest(0, 2));
    let text = of_host_and_guest(&world, vm, asked, |machine, host, vm| {
        let memory = &world.hyp.memory;
        let result = donate::host_to_guest(machine, memory, host, &mut vm.space, ram(4, 2), guest(0, 2));
        for page in 0..2 {
            let other = of_host(5 - page, Sharing::Owned);
            vm.space.table.set(machine, guest(page, 1), &mut vm.space.cache, other);
        }
        result
    });
    assert!(
        text.contains("guest page 0x80001: before: nothing; specification: page 0x40005, its own;"),
        "{text}"
    );
}

#[test]
fn a_lost_neighbour_at_el2_is_found() {
    let world = World::new();
    world.ok(HostCall::ShareHyp { pfn: RAM_START + 4, pages: 2 });
    world.hyp.pin(ram(4, 1).start()).unwrap();
    let text = of_host_and_hyp(&world, Asked::Pin(ram(5, 1).start()), |machine, host, hyp| {
        let result = share::pin(machine, &world.hyp.memory, host, hyp, ram(5, 1).start());
        hyp.table.set(machine, ram(4, 1).identity_va(), &mut host.pool, None);
        result.map(|()| 1)
    });
    assert!(text.contains("\n  page 0x40004 at EL2: specification: mapped; core: not\n"), "{text}");
}

#[test]
fn a_page_that_a_vm_does_not_get_back_in_time_is_found() {
    let world = World::new();
    let text = of_host_and_hyp(&world, Asked::TakeRoot(PROTECTED, ram(0x1000, 2)), |machine, host, hyp| {
        let root = ram(0x1000, 2);
        let donation = donate::host_to_hyp(machine, &world.hyp.memory, host, hyp, root, donate::Draw::Keep)?;
        donation.commit(machine, host, hyp);
        hyp.table.set(machine, ram(0x1000, 1).identity_va(), &mut host.pool, None);
        set_hyp(machine, host, hyp, 0x1000, Rights::ReadOnly);
        Ok(2)
    });
    assert!(text.contains("VM_CREATE of pages 0x41000 to 0x41001\n"), "{text}");
    assert!(text.contains("\n  page 0x41000 at EL2: specification: mapped; core: not\n"), "{text}");
}

#[test]
fn a_host_that_is_asked_for_pages_that_are_not_shared_is_found() {
    let world = World::new();
    let vm = donated(&world);
    assert_eq!(world.hyp.guest_share_host(vm, guest(0, 2)), Ok(2));
    let text = report(|| {
        let vm = world.hyp.vms.lock(vm).unwrap();
        let held = Held::only_vm(Some(&vm));
        Watch::begin(&world.hyp, Asked::MayUnshare(vm.handle(), guest(0, 2)), held).end(
            &world.hyp,
            held,
            Answer::Asks(2),
        );
        let watch = Watch::begin(&world.hyp, Asked::MayUnshare(vm.handle(), guest(0, 3)), held);
        watch.end(&world.hyp, held, Answer::Asks(3));
    });
    assert_eq!(
        text,
        "broken invariant: core and specification disagree over MEM_UNSHARE of vm0.1: guest pages 0x80000 to \
         0x80002\n  outcome: specification: INVALID_PARAMETER; core: asks the host, 3 pages\n "
    );
}

#[test]
fn a_chunk_whose_pages_all_lie_alone_is_checked_as_far_as_the_window_goes() {
    let world = World::new();
    let vm = world.protected_vm();
    world.ok(HostCall::VmTopUp { vm, pfn: RAM_START + 0x1100, pages: 8 });
    for page in 0..0x200 {
        let pfn = RAM_START + 0x2000 + 4 * page;
        while world.call(HostCall::DonateGuest { vm, pfn, gfn: GFN + page, pages: 1 }).outcome.is_err() {
            let pool = abi::page::Pool::Tables;
            world.ok(HostCall::PoolTopUp { pool, pfn: RAM_START + 0x1200 + page * 2, pages: 8 });
        }
    }
    let _ = world.hyp.guest_share_host(vm, guest(0, 0x200));
    let asked = Asked::Unshare(vm, guest(0, 0x200));
    let text = of_host_and_guest(&world, vm, asked, |machine, host, vm| {
        let result = crate::ownership::guest::unshare_host(machine, host, &mut vm.space, guest(0, 0x200));
        set_host(machine, host, 0x27fc, of_host(0x27fc, Sharing::Borrowed));
        result
    });
    assert!(
        text.contains("\n  page 0x427fc: before: a guest's, shared with the host; specification: vm0.1's"),
        "{text}"
    );
    assert_eq!(text.lines().count(), 3, "{text}");
}

#[test]
fn what_is_broken_before_a_call_is_told_before_it() {
    let world = World::new();
    let vm = donated(&world);
    set_host(world.hyp.machine(), &mut world.hyp.host.lock(), 5, of_host(5, Sharing::Owned));
    let text = report(|| {
        assert_eq!(world.hyp.guest_share_host(vm, guest(0, 1)), Ok(1));
    });
    assert_eq!(
        text,
        "broken invariant: before MEM_SHARE of vm0.1: guest page 0x80000\n  I2: the two sides' books disagree\n "
    );
    let text = report(|| {
        let (machine, mut vm) = (world.hyp.machine(), world.hyp.vms.lock(vm).unwrap());
        let vm = &mut *vm;
        vm.space.table.set(machine, guest(2, 1), &mut vm.space.cache, Entry::Locked);
        Watch::begin(&world.hyp, Asked::GuardMap(vm.handle(), guest(3, 1)), Held::only_vm(Some(vm)));
    });
    assert!(text.ends_with("\n  guest page 0x80002: an entry that no rule knows\n "), "{text}");
}

#[test]
fn what_a_transition_costs_is_counted() {
    let world = World::new();
    let before = super::cost().transitions;
    world.ok(HostCall::ShareHyp { pfn: RAM_START + 4, pages: 2 });
    // Other tests run beside this one.
    assert!(super::cost().transitions > before);
}

#[test]
fn a_page_with_too_few_rights_is_no_page_of_the_hosts() {
    let world = World::new();
    let text = of_host_and_hyp(&world, Asked::ShareHyp(ram(4, 1)), |machine, host, _| {
        let permissions = Permissions { write: false, execute: true };
        let pfn = ram(4, 1).start();
        set_host(machine, host, 4, Entry::Page(Page { pfn, sharing: Sharing::SharedWithHyp, permissions }));
        Ok(1)
    });
    assert!(text.contains("core: an entry that no rule knows\n"), "{text}");
    assert!(world.hyp.machine().is_zeros(ram(4, 1).start()));
}
