//! The calls of the host: from registers to an answer.
//!
//! Nothing is served before the call has been decoded as a whole, and no number in it is believed: page
//! numbers and counts become [`Pages`] or an error here, and what they name is checked by the transition,
//! under its locks (I8).

use crate::Hypervisor;
use crate::addr::{Pages, Pfn};
use crate::machine::Machine;
use crate::ownership::query::host_state;
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
    /// It was served or refused.
    Done(HostResult),
}

impl<M: Machine> Hypervisor<M> {
    /// Serves a call of the host on CPU `cpu`, given x0 to x6.
    pub fn host_call(&self, cpu: usize, words: &[u64; CALL_WORDS]) -> HostReply {
        self.counters.host_calls.fetch_add(1, Ordering::Relaxed);
        match HostCall::decode(words) {
            Ok(call) if call.is_test() && !cfg!(feature = "test-calls") => HostReply::NotSupported,
            Ok(call) => HostReply::Done(self.serve_host(cpu, call)),
            Err(DecodeError::UnknownFunction) => HostReply::NotSupported,
            Err(DecodeError::BadArgument(error)) => HostReply::Done(HostResult::refused(error)),
        }
    }

    #[inline]
    fn serve_host(&self, cpu: usize, call: HostCall) -> HostResult {
        match call {
            HostCall::Version => self.version(),
            HostCall::PoolTopUp { pool, pfn, pages } => {
                with_pages(pfn, pages, |pages| super::pages(self.pool_top_up(pool, pages)))
            }
            HostCall::VmTopUp { vm, pfn, pages } => {
                with_pages(pfn, pages, |pages| super::pages(self.vm_top_up(vm, pages)))
            }
            HostCall::ShareHyp { pfn, pages } => {
                with_pages(pfn, pages, |pages| super::pages(self.host_share_hyp(pages)))
            }
            HostCall::UnshareHyp { pfn, pages } => {
                with_pages(pfn, pages, |pages| super::pages(self.host_unshare_hyp(pages)))
            }
            HostCall::DonateGuest { vm, pfn, gfn, pages } => with_pages(pfn, pages, |pfns| {
                with_guest_pages(gfn, pages, |gfns| super::pages(self.host_donate_guest(vm, pfns, gfns)))
            }),
            HostCall::ShareGuest { vm, pfn, gfn, pages, permissions } => with_pages(pfn, pages, |pfns| {
                with_guest_pages(gfn, pages, |gfns| {
                    super::pages(self.host_share_guest(vm, pfns, gfns, permissions))
                })
            }),
            HostCall::UnshareGuest { vm, gfn, pages } => {
                with_guest_pages(gfn, pages, |gfns| super::pages(self.host_unshare_guest(vm, gfns)))
            }
            HostCall::ReclaimGuest { vm, gfn, pages } => {
                with_guest_pages(gfn, pages, |gfns| super::pages(self.host_reclaim_guest(vm, gfns)))
            }
            HostCall::QueryPage { pfn } => self.query_page(pfn),
            HostCall::ForceReclaim { pfn, pages } => {
                with_pages(pfn, pages, |pages| super::pages(self.host_force_reclaim(pages)))
            }
            HostCall::VmCreate { flags, root } => self.vm_create(flags, root),
            HostCall::VcpuCreate { vm, vcpu } => self.vcpu_create(vm, vcpu),
            HostCall::VcpuSetBoot { vm, vcpu, pc, x0 } => self.vcpu_set_boot(vm, vcpu, pc, x0),
            HostCall::VcpuRun { vm, vcpu, values } => self.vcpu_run(cpu, vm, vcpu, values),
            HostCall::VcpuGetReg { vm, vcpu, register } => self.vcpu_get_reg(vm, vcpu, register),
            HostCall::VcpuSetReg { vm, vcpu, register, value } => {
                self.vcpu_set_reg(vm, vcpu, register, value)
            }
            HostCall::UnshareAck { vm, vcpu } => self.unshare_ack(vm, vcpu),
            HostCall::VmTeardownStart { vm } => self.vm_teardown_start(vm),
            HostCall::VmTeardownFinish { vm } => self.vm_teardown_finish(vm),
            HostCall::TestPage { .. }
            | HostCall::TestCensus
            | HostCall::TestPin { .. }
            | HostCall::TestUnpin { .. }
            | HostCall::TestCounters
            | HostCall::TestEvents { .. } => self.serve_test(call),
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

    /// Calls of test builds: they only look, but for pins.
    #[cfg(feature = "test-calls")]
    fn serve_test(&self, call: HostCall) -> HostResult {
        use crate::pgtable::stage2::{Entry, Owner};
        use abi::HostState;
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

    /// Release builds have no such calls: `host_call` has said so.
    #[cfg(not(feature = "test-calls"))]
    fn serve_test(&self, _call: HostCall) -> HostResult {
        HostResult::refused(Error::Permission)
    }
}

/// Believes a range of physical pages only as far as it is one.
fn with_pages(pfn: u64, pages: u64, then: impl FnOnce(Pages<Pfn>) -> HostResult) -> HostResult {
    match Pages::from_raw(pfn, pages) {
        Some(pages) => then(pages),
        None => HostResult::refused(Error::Invalid),
    }
}

/// The same for a range of guest pages.
fn with_guest_pages(
    gfn: u64,
    pages: u64,
    then: impl FnOnce(Pages<crate::addr::Gfn>) -> HostResult,
) -> HostResult {
    match Pages::from_raw(gfn, pages) {
        Some(pages) => then(pages),
        None => HostResult::refused(Error::Invalid),
    }
}

impl<M> Hypervisor<M> {
    /// Table pages of the host's and the hypervisor's tables, in use or free: those of boot and those given.
    #[cfg(feature = "test-calls")]
    fn table_pages(&self) -> u64 {
        self.host.lock().pool.total()
    }
}
