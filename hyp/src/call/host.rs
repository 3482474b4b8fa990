//! The calls of the host: from registers to an answer.
//!
//! Nothing is served before the call has been decoded as a whole, and no number in it is believed: page
//! numbers and counts become [`Pages`] or an error here, and what they name is checked by the transition,
//! under its locks (I8).

use crate::Hypervisor;
use crate::addr::{Frame, Gfn, Pages, Pfn};
use crate::hypervisor::Counters;
use crate::machine::Machine;
use crate::ownership::Error as Refusal;
use crate::ownership::query::host_state;
#[cfg(feature = "test-calls")]
use crate::sync::Ordering;
use crate::vm::{MAX_VCPUS, MAX_VMS};
use crate::watch::{Answer, Asked, Held, Watch};
use abi::Error;
use abi::host::{CALL_WORDS, DecodeError, HostCall, HostResult, VERSION_MAJOR, VERSION_MINOR};

/// The answer to a call of the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HostReply {
    /// There is no such call.
    NotSupported,
    /// A transition of a range has done so many pages, or was refused. Ten words less to write for the calls that a
    /// host makes most.
    Pages(Result<u64, Refusal>),
    /// Any other call was served or refused.
    Values(HostResult),
}

impl HostReply {
    /// As a result of the interface; `None` if there is no such call.
    pub fn result(self) -> Option<HostResult> {
        match self {
            Self::NotSupported => None,
            Self::Pages(Ok(done)) => Some(HostResult::ok(&[done])),
            Self::Pages(Err(refusal)) => Some(refusal.into()),
            Self::Values(result) => Some(result),
        }
    }
}

impl<M: Machine> Hypervisor<M> {
    /// Serves a call of the host on CPU `cpu`, given x0 to x6.
    pub fn host_call(&self, cpu: usize, words: &[u64; CALL_WORDS]) -> HostReply {
        Counters::count(&self.counters.host_calls);
        match HostCall::decode(words) {
            Ok(call) if call.is_test() && !cfg!(feature = "test-calls") => HostReply::NotSupported,
            Ok(call) => self.serve_host(cpu, call),
            Err(DecodeError::UnknownFunction) => HostReply::NotSupported,
            Err(DecodeError::BadArgument(error)) => HostReply::Values(HostResult::refused(error)),
        }
    }

    #[inline(always)]
    fn serve_host(&self, cpu: usize, call: HostCall) -> HostReply {
        use HostReply::Values;
        match call {
            HostCall::PoolTopUp { pool, pfn, pages } => {
                with_pages(pfn, pages, |pages| self.pool_top_up(pool, pages))
            }
            HostCall::VmTopUp { vm, pfn, pages } => with_pages(pfn, pages, |pages| self.vm_top_up(vm, pages)),
            HostCall::ShareHyp { pfn, pages } => with_pages(pfn, pages, |pages| self.host_share_hyp(pages)),
            HostCall::UnshareHyp { pfn, pages } => {
                with_pages(pfn, pages, |pages| self.host_unshare_hyp(pages))
            }
            HostCall::DonateGuest { vm, pfn, gfn, pages } => {
                with_both(pfn, gfn, pages, |pfns, gfns| self.host_donate_guest(vm, pfns, gfns))
            }
            HostCall::ShareGuest { vm, pfn, gfn, pages, permissions } => {
                with_both(pfn, gfn, pages, |pfns, gfns| self.host_share_guest(vm, pfns, gfns, permissions))
            }
            HostCall::UnshareGuest { vm, gfn, pages } => {
                with_pages(gfn, pages, |gfns| self.host_unshare_guest(vm, gfns))
            }
            HostCall::ReclaimGuest { vm, gfn, pages } => {
                with_pages(gfn, pages, |gfns| self.host_reclaim_guest(vm, gfns))
            }
            HostCall::ForceReclaim { pfn, pages } => {
                with_pages(pfn, pages, |pages| self.host_force_reclaim(pages))
            }
            HostCall::Version => Values(self.version()),
            HostCall::QueryPage { pfn } => Values(self.query_page(pfn)),
            HostCall::VmCreate { flags, root } => Values(self.vm_create(flags, root)),
            HostCall::VcpuCreate { vm, vcpu } => Values(self.vcpu_create(vm, vcpu)),
            HostCall::VcpuSetBoot { vm, vcpu, pc, x0 } => Values(self.vcpu_set_boot(vm, vcpu, pc, x0)),
            HostCall::VcpuRun { vm, vcpu, values } => Values(self.vcpu_run(cpu, vm, vcpu, values)),
            HostCall::VcpuGetReg { vm, vcpu, register } => Values(self.vcpu_get_reg(vm, vcpu, register)),
            HostCall::VcpuSetReg { vm, vcpu, register, value } => {
                Values(self.vcpu_set_reg(vm, vcpu, register, value))
            }
            HostCall::UnshareAck { vm, vcpu } => Values(self.unshare_ack(vm, vcpu)),
            HostCall::VmTeardownStart { vm } => Values(self.vm_teardown_start(vm)),
            HostCall::VmTeardownFinish { vm } => Values(self.vm_teardown_finish(vm)),
            HostCall::TestPage { .. }
            | HostCall::TestCensus
            | HostCall::TestPin { .. }
            | HostCall::TestUnpin { .. }
            | HostCall::TestCounters
            | HostCall::TestEvents { .. }
            | HostCall::TestFail { .. } => Values(self.serve_test(call)),
        }
    }

    fn version(&self) -> HostResult {
        let features = if cfg!(feature = "test-calls") { abi::host::FEATURE_TEST_CALLS } else { 0 };
        HostResult::ok(&[
            u64::from(VERSION_MAJOR) << 16 | u64::from(VERSION_MINOR),
            features,
            MAX_VMS as u64,
            MAX_VCPUS as u64,
            u64::from(crate::pgtable::stage2::GUEST_IPA_BITS),
        ])
    }

    /// May the host access this page? One look under the host's lock.
    #[inline(never)]
    fn query_page(&self, pfn: u64) -> HostResult {
        let Some(page) = Pfn::new(pfn) else {
            return HostResult::refused(Error::Invalid);
        };
        let host = self.host.lock();
        let held = Held { host: Some(&host), hyp: None, vm: None };
        let watch = Watch::begin(self, Asked::QueryPage(page), held);
        let state = host_state(host.table.entry(&self.machine, page.identity()));
        let is_memory = self.memory.contains(page);
        watch.end(self, held, Answer::Page(state, is_memory));
        HostResult::ok(&[state as u64, u64::from(is_memory)])
    }

    /// Calls of test builds: they only look, but for pins and the one that breaks everything.
    #[cfg(feature = "test-calls")]
    fn serve_test(&self, call: HostCall) -> HostResult {
        use crate::pgtable::stage2::{Entry, Owner};
        use abi::HostState;
        use abi::host::FailureKind;
        use abi::page::OwnerKind;

        let with_page = |pfn, f: &dyn Fn(Pfn) -> HostResult| match Pfn::new(pfn) {
            Some(page) => f(page),
            None => HostResult::refused(Error::Invalid),
        };
        match call {
            HostCall::TestPage { pfn } => with_page(pfn, &|page| {
                let host = self.host.lock();
                let hyp = self.hyp.lock();
                let entry = host.table.entry(&self.machine, page.identity());
                let (owner, vm, gfn) = match entry {
                    Some(Entry::Owned(Owner::Guest { vm, gfn })) => {
                        (OwnerKind::Guest, vm.to_word(), gfn.as_u64())
                    }
                    Some(Entry::Page(_)) if host_state(entry) == HostState::SharedBorrowed => {
                        (OwnerKind::Guest, 0, 0)
                    }
                    Some(Entry::Page(_)) => (OwnerKind::Host, 0, 0),
                    _ => (OwnerKind::Hyp, 0, 0),
                };
                let mapped = hyp.table.entry(&self.machine, page.identity_va()).flatten().is_some();
                HostResult::ok(&[host_state(entry) as u64, owner as u64, vm, gfn, u64::from(mapped)])
            }),
            HostCall::TestCensus => {
                let census = self.census();
                let free = self.host.lock().pool.free();
                HostResult::ok(&[
                    census.host.saturating_add(census.host_shared),
                    census.hyp,
                    census.guest.saturating_add(census.guest_shared),
                    self.table_pages().saturating_sub(free),
                    free,
                    self.records.used(),
                ])
            }
            HostCall::TestPin { pfn } => with_page(pfn, &|page| super::unit(self.pin(page))),
            HostCall::TestUnpin { pfn } => with_page(pfn, &|page| super::unit(self.unpin(page))),
            HostCall::TestEvents { from } => match self.machine.event(from) {
                Some(event) => {
                    let [number, kind] = [event.number, event.kind as u64];
                    HostResult::ok(&[number, kind, event.vmid, event.address, event.old, event.new])
                }
                None => HostResult::ok(&[]),
            },
            HostCall::TestFail { kind, pfn } => with_page(pfn, &|page| {
                FailureKind::from_word(kind)
                    .map_or_else(|| HostResult::refused(Error::Invalid), |kind| self.fail(kind, page))
            }),
            _ => {
                let read = |counter: &crate::sync::AtomicU64| counter.load(Ordering::Relaxed);
                HostResult::ok(&[
                    read(&self.counters.aborts_injected),
                    read(&self.counters.aborts_retried),
                    read(&self.counters.host_calls),
                    read(&self.counters.guest_entries),
                ])
            }
        }
    }

    /// Breaks as it is told. Returns if it turns out that EL2 maps the page; what is in it is not the host's to know.
    #[cfg(feature = "test-calls")]
    #[inline(never)]
    fn fail(&self, kind: abi::host::FailureKind, page: Pfn) -> HostResult {
        use abi::host::FailureKind;
        match kind {
            FailureKind::Invariant => crate::broken("the host asked for it, by TEST_FAIL"),
            FailureKind::Access => {
                self.machine.read_descriptor(page.base());
            }
            FailureKind::Stack => {
                call_itself(0);
            }
        }
        HostResult::ok(&[])
    }

    /// Release builds have no such calls: `host_call` has said so.
    #[cfg(not(feature = "test-calls"))]
    fn serve_test(&self, _call: HostCall) -> HostResult {
        HostResult::refused(Error::Permission)
    }
}

/// Uses up any stack.
#[cfg(feature = "test-calls")]
fn call_itself(depth: u64) -> u64 {
    let frame = [depth; 32];
    let deeper = if depth == u64::MAX { 0 } else { call_itself(depth.wrapping_add(1)) };
    core::hint::black_box(&frame);
    deeper
}

/// Believes a range of pages only as far as it is one.
#[inline(always)]
fn with_pages<F: Frame>(
    first: u64,
    pages: u64,
    transition: impl FnOnce(Pages<F>) -> Result<u64, Refusal>,
) -> HostReply {
    HostReply::Pages(match Pages::from_raw(first, pages) {
        Some(pages) => transition(pages),
        None => Err(Refusal::BadRange),
    })
}

/// The same for a range of the host's pages and as many of a guest's.
#[inline(always)]
fn with_both(
    pfn: u64,
    gfn: u64,
    pages: u64,
    transition: impl FnOnce(Pages<Pfn>, Pages<Gfn>) -> Result<u64, Refusal>,
) -> HostReply {
    with_pages(pfn, pages, |pfns| match Pages::from_raw(gfn, pages) {
        Some(gfns) => transition(pfns, gfns),
        None => Err(Refusal::BadRange),
    })
}

impl<M> Hypervisor<M> {
    /// Table pages of the host's and the hypervisor's tables, in use or free: those of boot and those given.
    #[cfg(feature = "test-calls")]
    fn table_pages(&self) -> u64 {
        self.host.lock().pool.total()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::World;

    #[test]
    fn the_version_comes_with_what_the_build_can_do() {
        let world = World::new();
        let result = world.call(HostCall::Version);
        assert_eq!(result.outcome, Ok(()));
        let [version, features, vms, vcpus, bits, ..] = result.values;
        assert_eq!(version, u64::from(VERSION_MAJOR) << 16 | u64::from(VERSION_MINOR));
        assert_eq!(features, u64::from(cfg!(feature = "test-calls")) * abi::host::FEATURE_TEST_CALLS);
        assert_eq!((vms, vcpus, bits), (MAX_VMS as u64, MAX_VCPUS as u64, 40));
    }

    #[test]
    fn test_calls_are_there_in_test_builds_alone() {
        let world = World::new();
        for call in [HostCall::TestCensus, HostCall::TestCounters, HostCall::TestPin { pfn: 0 }] {
            let served = world.hyp.host_call(0, &call.encode()) != HostReply::NotSupported;
            assert_eq!(served, cfg!(feature = "test-calls"), "{call:?}");
        }
    }

    #[cfg(feature = "test-calls")]
    #[test]
    fn a_failure_that_does_not_happen_shows_nothing_of_the_hypervisors() {
        use abi::host::FailureKind;

        let world = World::new();
        let fail = |kind, pfn| world.call(HostCall::TestFail { kind, pfn });
        let root = world.hyp.host_stage2().root;
        assert_ne!(world.sim().load64(root.base().as_u64()), 0);
        let access = FailureKind::Access as u64;
        assert_eq!(fail(access, root.as_u64()), HostResult::ok(&[]), "EL2 maps it");
        assert_eq!(fail(3, 0), HostResult::refused(Error::Invalid));
        assert_eq!(fail(access, u64::MAX), HostResult::refused(Error::Invalid));
    }

    #[cfg(feature = "test-calls")]
    #[test]
    #[should_panic(expected = "the host asked for it, by TEST_FAIL")]
    fn an_invariant_breaks_on_request() {
        World::new().call(HostCall::TestFail { kind: abi::host::FailureKind::Invariant as u64, pfn: 0 });
    }

    #[cfg(feature = "test-calls")]
    #[test]
    fn test_calls_tell_what_the_core_knows() {
        use crate::testing::{HYP_START, PROTECTED, RAM_START};
        use abi::HostState;
        use abi::page::OwnerKind;

        let world = World::new();
        let vm = world.vm(PROTECTED, 0x1000, 16);
        world.ok(HostCall::DonateGuest { vm, pfn: RAM_START, gfn: 7, pages: 2 });
        world.ok(HostCall::ShareHyp { pfn: RAM_START + 9, pages: 1 });
        let values = |call| {
            let result = world.call(call);
            assert_eq!(result.outcome, Ok(()), "{call:?}");
            result.values
        };
        let page = |pfn| values(HostCall::TestPage { pfn })[..5].to_vec();
        let (none, guest) = (HostState::NoPage as u64, OwnerKind::Guest as u64);
        assert_eq!(page(RAM_START + 1), [none, guest, vm.to_word(), 8, 0]);
        assert_eq!(page(HYP_START), [none, OwnerKind::Hyp as u64, 0, 0, 1]);
        assert_eq!(page(RAM_START + 5), [HostState::Owned as u64, OwnerKind::Host as u64, 0, 0, 0]);

        let census = world.census();
        let free = world.hyp.host.lock().pool.free();
        let [host, hyp, guest, used, lacking, records, ..] = values(HostCall::TestCensus);
        assert_eq!((host, hyp, guest), (census.host + 1, census.hyp, 2));
        assert_eq!((used + lacking, lacking), (world.hyp.host.lock().pool.total(), free));
        assert_eq!(records, world.hyp.records.used());
        assert!(records > 0, "the VM has a record");

        world.hyp.count_injected();
        let [injected, retried, calls, entries, ..] = values(HostCall::TestCounters);
        let counted = world.hyp.counters.host_calls.load(Ordering::Relaxed);
        assert_eq!((injected, retried, calls, entries), (1, 0, counted, 0));
    }
}
