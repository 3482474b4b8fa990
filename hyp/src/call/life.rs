//! The life of a VM: creation, vCPUs, and teardown in two phases.
//!
//! Source of the rules: Linux 7.2 `__pkvm_init_vm` to `__pkvm_finalize_teardown_vm`; unlike there, teardown
//! cannot end while a page still names the VM, and a handle never comes back.

use super::unit;
use crate::Hypervisor;
use crate::addr::{Pages, Pfn};
use crate::machine::{Machine, Tree};
use crate::ownership::donate::{self, Draw};
use crate::ownership::guest::GuestSpace;
use crate::ownership::{Host, HypSpace};
use crate::pgtable::stage2::GUEST_IPA_BITS;
use crate::pgtable::{Level, Table};
use crate::pool::PagePool;
use crate::pool::records::Record;
use crate::vm::{VcpuError, Vm, root_pages};
use crate::watch::{Answer, Asked, Held, Watch};
use abi::host::HostResult;
use abi::{Error, VmFlags, VmHandle};

/// Pages that one call to end a VM gives back at the most: each is wiped, and each table is looked for.
const PAGES_PER_CALL: u64 = 16;

impl<M: Machine> Hypervisor<M> {
    /// Makes a VM over two pages of the host that become its root tables.
    #[inline(never)]
    pub(crate) fn vm_create(&self, flags: VmFlags, root: u64) -> HostResult {
        let root = match root_pages(root) {
            Ok(root) => root,
            Err(error) => return HostResult::refused(error),
        };
        let creation = self.vms.creation.lock();
        let Some(handle) = self.vms.free_handle(&creation) else {
            return HostResult::refused(Error::Busy);
        };
        let regime = self.guest_regime(crate::vm::vmid(handle));
        let table = Table::new(root.start(), Level::ONE, GUEST_IPA_BITS, regime);
        let space = GuestSpace { handle, table, cache: PagePool::new(), pages: 0 };
        // In one hold of these locks the host loses the root and the handle gets its VM: no other CPU sees one without
        // the other.
        let mut host = self.host.lock();
        let mut hyp = self.hyp.lock();
        let record = match self.take_root(&mut host, &mut hyp, root, Vm::new(flags, space)) {
            Ok(record) => record,
            Err(error) => return error.into(),
        };
        record.space.table.clear(&self.machine);
        self.machine.adopt(Tree::Stage2(record.id()), GUEST_IPA_BITS);
        self.vms.insert(&creation, record);
        HostResult::ok(&[handle.to_word()])
    }

    /// Makes a vCPU.
    #[inline(never)]
    pub(crate) fn vcpu_create(&self, vm: VmHandle, vcpu: u64) -> HostResult {
        let Some(result) = self.with_vm(vm, |vm| vm.add_vcpu(&self.records, vcpu)) else {
            return HostResult::refused(Error::NoEntry);
        };
        match result {
            Ok(()) => HostResult::ok(&[]),
            Err(VcpuError::Refused(error)) => HostResult::refused(error),
            Err(VcpuError::Lacking(lacking)) => lacking.into(),
        }
    }

    /// Begins the end of a VM.
    #[inline(never)]
    pub(crate) fn vm_teardown_start(&self, vm: VmHandle) -> HostResult {
        let mut guard = self.vms.lock(vm);
        let watch = Watch::begin(self, Asked::TeardownStart(vm), Held::only_vm(guard.as_deref()));
        let result = guard.as_deref_mut().map_or(Err(Error::NoEntry), |vm| vm.start_teardown(&self.machine));
        watch.end(self, Held::only_vm(guard.as_deref()), Answer::from_vm(result));
        unit(result.map_err(HostResult::refused))
    }

    /// Gives back the pages that the host gave for a VM's tables, some each time; with the root the VM and its
    /// handle go, so that a VM that is there has its tables. Returns the number of pages and how many are left.
    #[inline(never)]
    pub(crate) fn vm_teardown_finish(&self, handle: VmHandle) -> HostResult {
        let mut host = self.host.lock();
        let mut hyp = self.hyp.lock();
        let guard = self.vms.lock(handle);
        let watch = Watch::begin(self, Asked::TeardownFinish(handle), Held::only_vm(guard.as_deref()));
        let ready = guard.as_deref().map_or(Err(Error::NoEntry), Vm::check_end);
        watch.end(self, Held::only_vm(guard.as_deref()), Answer::from_vm(ready));
        let mut vm = match (guard, ready) {
            (Some(vm), Ok(())) => vm,
            (_, Err(error)) => return HostResult::refused(error),
            (None, Ok(())) => return HostResult::refused(Error::NoEntry),
        };
        let mut done = 0u64;
        loop {
            let Some(pages) = vm.next_pages(&self.machine) else {
                crate::broken("a VM's root leaves the address space");
            };
            let after = done.saturating_add(pages.count());
            if after > PAGES_PER_CALL {
                return HostResult::ok(&[done, vm.given]);
            }
            let is_last = vm.given <= pages.count();
            if is_last != (pages.start() == vm.space.table.root()) {
                crate::broken("a page that a host gave to a VM is lost");
            }
            let held = Held { host: Some(&host), hyp: Some(&hyp), vm: Some(&vm) };
            let watch = Watch::begin(self, Asked::GiveBack(handle, pages), held);
            let release = || vm.release_pages(&self.machine, pages);
            let result =
                donate::hyp_to_host(&self.machine, &self.memory, &mut host, &mut hyp, pages, release);
            let held = Held { host: Some(&host), hyp: Some(&hyp), vm: Some(&vm) };
            watch.end(self, held, Answer::from(&result.map(|()| pages.count())));
            if let Err(error) = result {
                return if done > 0 { HostResult::ok(&[done, vm.given]) } else { error.into() };
            }
            done = after;
            if is_last {
                vm.remove(&self.machine, &self.records);
                return HostResult::ok(&[done, 0]);
            }
            vm.given = vm.given.saturating_sub(pages.count());
        }
    }

    /// Takes the root of a new VM from the host, and a record for the VM.
    fn take_root(
        &self,
        host: &mut Host,
        hyp: &mut HypSpace,
        root: Pages<Pfn>,
        vm: Vm,
    ) -> Result<Record<Vm>, crate::ownership::Error> {
        let mut record = None;
        self.change_host_and_hyp(host, hyp, Asked::TakeRoot(vm.flags, root), |host, hyp| {
            let donation = donate::host_to_hyp(&self.machine, &self.memory, host, hyp, root, Draw::Keep)?;
            record = Some(self.records.alloc(vm)?);
            Ok(donation.commit(&self.machine, host, hyp).count())
        })?;
        match record {
            Some(record) => Ok(record),
            None => crate::broken("a root was taken without a record"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sync::WAITS;
    use crate::testing::{PROTECTED, RAM_START, World, become_cpu};
    use crate::vm::MAX_VCPUS;
    use crate::vm::context::Trap;
    use crate::vm::power::Start;
    use abi::host::{HostCall, VM_ROOT_PAGES};
    use abi::page::Pool;
    use abi::{HostState, psci};
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::sync::mpsc;
    use std::time::{Duration, Instant};

    #[test]
    fn teardown_returns_every_page_and_the_census_is_that_of_the_start() {
        let world = World::new();
        let before = (world.census(), world.hyp.records.used());
        let vm = world.protected_vm();
        world.ok(HostCall::VcpuCreate { vm, vcpu: 0 });
        for page in 0..40 {
            world.ok(HostCall::DonateGuest { vm, pfn: RAM_START + page, gfn: page * 0x200, pages: 1 });
            if page == 12 {
                world.ok(HostCall::VmTopUp { vm, pfn: RAM_START + 0x1012, pages: 40 });
            }
        }
        world.ok(HostCall::VmTeardownStart { vm });
        assert_eq!(world.call(HostCall::VmTeardownFinish { vm }).outcome, Err(Error::Busy), "pages are out");
        for page in 0..40 {
            world.ok(HostCall::ReclaimGuest { vm, gfn: page * 0x200, pages: 1 });
        }
        world.finish(vm);
        world.check();
        assert_eq!((world.census(), world.hyp.records.used()), before);
        assert_eq!(world.host_state(0x1000), Some(HostState::Owned));
    }

    #[test]
    fn a_vm_that_was_given_a_whole_block_gives_it_back_page_by_page() {
        let world = World::new();
        let vm = world.vm(PROTECTED, 0x1000, 0);
        let before = world.census();
        world.ok(HostCall::VmTopUp { vm, pfn: RAM_START + 0x1200, pages: 0x200 });
        world.ok(HostCall::VmTeardownStart { vm });
        world.finish(vm);
        world.check();
        assert_eq!(world.census().host, before.host + 2, "the root came back too");
        assert!(world.host_reads(0x1200) && world.host_reads(0x13ff));
    }

    /// The number of pages that one call gives back is no divisor of what there is, whatever there is.
    #[test]
    fn a_vm_that_is_there_has_its_root() {
        for tables in 0..2 * PAGES_PER_CALL {
            let world = World::new();
            let before = world.census();
            let vm = world.vm(PROTECTED, 0x1000, tables);
            world.ok(HostCall::VmTeardownStart { vm });
            let mut back = 0;
            loop {
                let finish = world.call(HostCall::VmTeardownFinish { vm });
                assert_eq!(finish.outcome, Ok(()));
                back += finish.values[0];
                if finish.values[1] == 0 {
                    break;
                }
                assert_eq!(finish.values[1], tables + VM_ROOT_PAGES - back);
                assert_eq!(world.host_state(0x1000), Some(HostState::NoPage), "{tables} tables, {back} back");
                let reclaim = HostCall::ReclaimGuest { vm, gfn: 0, pages: 1 };
                assert_eq!(world.call(reclaim).outcome, Err(Error::NoEntry), "its tables are looked at");
                world.check();
            }
            assert_eq!((back, world.census()), (tables + VM_ROOT_PAGES, before));
            world.check();
        }
    }

    #[test]
    fn a_vm_whose_end_has_begun_does_not_keep_the_others_from_being_wiped() {
        let world = World::new();
        let dying = world.vm(PROTECTED, 0x1000, PAGES_PER_CALL - 1);
        let alive = world.vm(PROTECTED, 0x1100, 16);
        world.fill(0);
        world.ok(HostCall::DonateGuest { vm: alive, pfn: RAM_START, gfn: 0, pages: 1 });
        world.ok(HostCall::VmTeardownStart { vm: dying });
        world.ok(HostCall::VmTeardownFinish { vm: dying });
        assert_eq!(world.hyp.wipe_all_guests(), 1);
        assert!(world.is_wiped(0));
    }

    #[test]
    fn where_a_guest_starts_its_vcpus_is_forgotten_when_they_have_started_and_at_every_end() {
        let turned_on = |at_end: fn(&World, VmHandle)| {
            let world = World::new();
            let vm = world.protected_vm();
            for vcpu in 0..2 {
                world.ok(HostCall::VcpuCreate { vm, vcpu });
            }
            world.ok(HostCall::VcpuSetBoot { vm, vcpu: 0, pc: 0x1000, x0: 0 });
            world.guest_call(vm, 0, [psci::CPU_ON.into(), 1, 0x8000_1000, 0x5ec4e7]);
            let starts = || world.hyp.with_vm(vm, |vm| vm.starts).unwrap();
            assert_eq!(starts()[1], Start { pc: 0x8000_1000, context_id: 0x5ec4e7 });
            at_end(&world, vm);
            assert_eq!(starts(), <[Start; MAX_VCPUS]>::default());
        };
        turned_on(|world, vm| {
            world.call(HostCall::VcpuRun { vm, vcpu: 1, values: [0; 4] });
        });
        turned_on(|world, _| {
            world.hyp.wipe_all_guests();
        });
        turned_on(|world, vm| {
            world.ok(HostCall::VmTeardownStart { vm });
        });
    }

    #[test]
    fn what_a_guest_owns_is_wiped_only_when_it_runs_on_no_cpu() {
        let world = World::new();
        let vm = world.protected_vm();
        world.ok(HostCall::VcpuCreate { vm, vcpu: 0 });
        world.ok(HostCall::DonateGuest { vm, pfn: RAM_START, gfn: 0, pages: 1 });
        world.sim().store64(RAM_START << 12, 0x5ec4e7);
        let claim = world.hyp.claim(vm, 0).unwrap();
        let left = AtomicBool::new(false);
        let waits = WAITS.load(Ordering::SeqCst);
        std::thread::scope(|scope| {
            let wiping = scope.spawn(|| {
                let wiped = world.hyp.wipe_all_guests();
                assert!(left.load(Ordering::SeqCst), "a guest that runs was wiped");
                wiped
            });
            while world.hyp.may_enter(&claim) {
                std::thread::yield_now();
            }
            // It waits now, or has done its work.
            while WAITS.load(Ordering::SeqCst) == waits && !wiping.is_finished() {
                std::thread::yield_now();
            }
            assert_eq!(world.sim().load64(RAM_START << 12), 0x5ec4e7);
            left.store(true, Ordering::SeqCst);
            world.hyp.unclaim(claim);
            assert_eq!(wiping.join().unwrap(), 1);
        });
        assert!(world.is_wiped(0));
    }

    #[test]
    fn the_stacks_that_guests_run_on_are_zeroed_when_no_cpu_is_on_one() {
        let world = World::new();
        let machine = world.hyp.machine();
        let vm = world.protected_vm();
        world.ok(HostCall::VcpuCreate { vm, vcpu: 0 });
        world.ok(HostCall::VcpuSetBoot { vm, vcpu: 0, pc: 0x1000, x0: 0 });
        machine.leave_guest_stacks_slowly();
        let (entered, has_entered) = mpsc::channel();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                become_cpu(1);
                machine.push_step(move |_| {
                    let before = WAITS.load(Ordering::SeqCst);
                    entered.send(()).unwrap();
                    // The end of the machine waits for this guest now, if it waits at all.
                    let patience = Instant::now() + Duration::from_secs(1);
                    while WAITS.load(Ordering::SeqCst) == before && Instant::now() < patience {
                        std::thread::yield_now();
                    }
                    Trap::Irq
                });
                world.call(HostCall::VcpuRun { vm, vcpu: 0, values: [0; 4] });
            });
            has_entered.recv_timeout(Duration::from_secs(10)).unwrap();
            world.hyp.wipe_all_guests();
            assert!(machine.has_forgotten_guest_stacks());
        });
    }

    #[test]
    fn registers_of_a_vm_that_is_gone_are_gone_from_memory_too() {
        let world = World::new();
        let vm = world.protected_vm();
        world.ok(HostCall::VcpuCreate { vm, vcpu: 0 });
        world.ok(HostCall::VcpuCreate { vm, vcpu: 1 });
        world.ok(HostCall::VmTeardownStart { vm });
        world.hyp.machine().take_cleaned();
        world.finish(vm);
        let vcpu = size_of::<crate::vm::vcpu::Vcpu>();
        assert_eq!(world.hyp.machine().take_cleaned(), [vcpu, vcpu, size_of::<Vm>()]);
    }

    #[test]
    fn a_handle_is_never_used_again() {
        let world = World::new();
        let first = world.protected_vm();
        world.ok(HostCall::VmTeardownStart { vm: first });
        world.finish(first);
        let second = world.protected_vm();
        assert_eq!(second.slot(), first.slot());
        assert_ne!(second, first);
        let calls = [
            HostCall::DonateGuest { vm: first, pfn: RAM_START, gfn: 0, pages: 1 },
            HostCall::VcpuCreate { vm: first, vcpu: 0 },
            HostCall::VcpuRun { vm: first, vcpu: 0, values: [0; 4] },
            HostCall::VmTopUp { vm: first, pfn: RAM_START, pages: 1 },
            HostCall::VmTeardownStart { vm: first },
            HostCall::VmTeardownFinish { vm: first },
        ];
        for call in calls {
            assert_eq!(world.call(call).outcome, Err(Error::NoEntry), "{call:?}");
        }
        world.check();
    }

    #[test]
    fn a_vm_takes_each_step_of_its_life_once_and_in_order() {
        let world = World::new();
        let vm = world.protected_vm();
        let outcome = |call| world.call(call).outcome;
        assert_eq!(outcome(HostCall::VmTeardownFinish { vm }), Err(Error::Permission));
        assert_eq!(outcome(HostCall::VcpuCreate { vm, vcpu: 1 }), Err(Error::Invalid));
        assert_eq!(outcome(HostCall::VcpuCreate { vm, vcpu: 0 }), Ok(()));
        assert_eq!(outcome(HostCall::VcpuCreate { vm, vcpu: 0 }), Err(Error::Exists));
        assert_eq!(outcome(HostCall::VcpuCreate { vm, vcpu: u64::MAX }), Err(Error::Invalid));
        assert_eq!(outcome(HostCall::VmTeardownStart { vm }), Ok(()));
        assert_eq!(outcome(HostCall::VmTeardownStart { vm }), Err(Error::Permission));
        let after = [
            HostCall::VcpuCreate { vm, vcpu: 1 },
            HostCall::VcpuRun { vm, vcpu: 0, values: [0; 4] },
            HostCall::DonateGuest { vm, pfn: RAM_START, gfn: 0, pages: 1 },
        ];
        for call in after {
            assert_eq!(outcome(call), Err(Error::Permission), "{call:?}");
        }
        assert_eq!(outcome(HostCall::VmTopUp { vm, pfn: RAM_START, pages: 20 }), Ok(()));
        assert_eq!(outcome(HostCall::VmTeardownFinish { vm }), Ok(()));
        assert_eq!(outcome(HostCall::VmTopUp { vm, pfn: RAM_START + 20, pages: 1 }), Err(Error::Permission));
        world.finish(vm);
        world.check();
    }

    #[test]
    fn a_vm_that_cannot_be_made_leaves_its_root_to_the_host() {
        let world = World::new();
        let before = (world.census(), world.hyp.records.used());
        for root in [RAM_START + 1, u64::MAX, 0x9000, crate::testing::HYP_START] {
            let result = world.call(HostCall::VmCreate { flags: PROTECTED, root });
            assert!(result.outcome.is_err(), "{root:#x}");
        }
        assert_eq!((world.census(), world.hyp.records.used()), before);
    }

    #[test]
    fn a_root_that_is_not_the_hosts_is_refused_as_that_even_if_no_record_is_left() {
        let world = World::new();
        let root = RAM_START + 0x1000;
        // Records run out.
        let first_lack = (0..0x200).find_map(|number| {
            let vm = HostCall::VmCreate { flags: PROTECTED, root: root + 2 * number };
            world.call(vm).outcome.err().map(|error| (error, root + 2 * number))
        });
        let (error, next) = first_lack.unwrap();
        assert_eq!(error, Error::NoMemory);
        let create = |root| world.call(HostCall::VmCreate { flags: PROTECTED, root }).outcome;
        assert_eq!(create(root), Err(Error::Permission));
        assert_eq!(create(next), Err(Error::NoMemory));
        world.check();
    }

    #[test]
    fn an_end_that_lacks_tables_has_not_begun() {
        let world = World::new();
        let vm = world.vm(PROTECTED, 0x1000, 0);
        // A block on both sides: to give one page of it back splits them.
        world.ok(HostCall::VmTopUp { vm, pfn: RAM_START + 0x1200, pages: 0x200 });
        world.ok(HostCall::VmTeardownStart { vm });
        world.drain_tables();
        let finish = || world.call(HostCall::VmTeardownFinish { vm });
        assert_eq!(finish().outcome, Err(Error::NoMemory));
        let top_up = HostCall::VmTopUp { vm, pfn: RAM_START + 0x1002, pages: 2 };
        assert_eq!(world.call(top_up).outcome, Ok(()), "nothing has changed");
        // Those two come first; then it lacks tables again, and is told so only when it cannot go on.
        assert_eq!(finish().values[..2], [2, 0x202]);
        let lacking = finish();
        assert_eq!(lacking.outcome, Err(Error::NoMemory));
        let (pfn, pages) = (RAM_START + 0x1020, lacking.values[0]);
        world.ok(HostCall::PoolTopUp { pool: Pool::Tables, pfn, pages });
        world.finish(vm);
    }

    #[test]
    fn all_slots_taken_is_an_answer() {
        let world = World::new();
        world.ok(HostCall::PoolTopUp {
            pool: abi::page::Pool::Metadata,
            pfn: RAM_START + 0x2000,
            pages: 0x100,
        });
        for slot in 0..crate::vm::MAX_VMS as u64 {
            world.vm(PROTECTED, 0x1000 + 2 * slot, 0);
        }
        let result = world.call(HostCall::VmCreate { flags: PROTECTED, root: RAM_START + 0x1800 });
        assert_eq!(result.outcome, Err(Error::Busy));
        world.check();
    }

    #[test]
    fn a_vcpu_that_cannot_be_made_leaves_nothing_behind_however_often_it_is_tried() {
        let world = World::new();
        let vm = world.protected_vm();
        world.ok(HostCall::ShareHyp { pfn: RAM_START, pages: 1 });
        let before = (world.census(), world.hyp.records.used());
        for _ in 0..100 {
            world.fail_allocation(1);
            let lacking = world.call(HostCall::VcpuCreate { vm, vcpu: 0 });
            world.stop_failing();
            assert_eq!(lacking.outcome, Err(Error::NoMemory));
            let run = HostCall::VcpuRun { vm, vcpu: 0, values: [0; 4] };
            assert_eq!(world.call(run).outcome, Err(Error::NoEntry), "half of it is nothing");
            assert_eq!(world.call(HostCall::VcpuCreate { vm, vcpu: 1 }).outcome, Err(Error::Invalid));
        }
        assert_eq!((world.census(), world.hyp.records.used()), before);
        world.ok(HostCall::UnshareHyp { pfn: RAM_START, pages: 1 });
        world.ok(HostCall::VcpuCreate { vm, vcpu: 0 });
        world.ok(HostCall::VmTeardownStart { vm });
        world.finish(vm);
        world.check();
    }
}
