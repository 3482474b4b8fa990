//! The specification's calls on the real hypervisor, by whoever makes them.

use abi::host::HostResult;
use abi::page::Pool;
use abi::{Error, HostCall, HostState, VmFlags, VmHandle};
use host_programs::deed::{Answer, Touch};
use host_programs::{Failure, failure};
use spec::state::{GuestEntry, Phase, VCPUS};
use spec::{Call, Outcome};

use crate::guest::Act;
use crate::play::Play;

impl Play<'_> {
    /// A VM's handle; one that nobody has for a VM that was not made.
    pub(crate) fn handle(&self, vm: u8) -> VmHandle {
        let known = self.handles.get(usize::from(vm)).copied().flatten();
        known.unwrap_or_else(|| VmHandle::new(200, 7).expect("a handle can be so"))
    }

    /// The host's call, where that is all that there is to it.
    pub(crate) fn plain(&self, call: Call) -> Option<HostCall> {
        let pfn = |first: u64| self.world.pfn.saturating_add(first);
        let gfn = |first: u64| self.world.gfn.saturating_add(first);
        let handle = |vm: u8| self.handle(vm);
        Some(match call {
            Call::PoolTopUp { pool, pfns } => {
                HostCall::PoolTopUp { pool, pfn: pfn(pfns.first), pages: pfns.count }
            }
            Call::VmTopUp { vm, pfns } => {
                HostCall::VmTopUp { vm: handle(vm), pfn: pfn(pfns.first), pages: pfns.count }
            }
            Call::ShareHyp { pfns } => HostCall::ShareHyp { pfn: pfn(pfns.first), pages: pfns.count },
            Call::UnshareHyp { pfns } => HostCall::UnshareHyp { pfn: pfn(pfns.first), pages: pfns.count },
            Call::DonateGuest { vm, pfn: page, gfn: at, count: pages } => {
                HostCall::DonateGuest { vm: handle(vm), pfn: pfn(page), gfn: gfn(at), pages }
            }
            Call::ShareGuest { vm, pfn: page, gfn: at, count: pages, permissions } => {
                HostCall::ShareGuest { vm: handle(vm), pfn: pfn(page), gfn: gfn(at), pages, permissions }
            }
            Call::UnshareGuest { vm, gfns } => {
                HostCall::UnshareGuest { vm: handle(vm), gfn: gfn(gfns.first), pages: gfns.count }
            }
            Call::ReclaimGuest { vm, gfns } => {
                HostCall::ReclaimGuest { vm: handle(vm), gfn: gfn(gfns.first), pages: gfns.count }
            }
            Call::ForceReclaim { pfns } => HostCall::ForceReclaim { pfn: pfn(pfns.first), pages: pfns.count },
            Call::QueryPage { pfn: page } => HostCall::QueryPage { pfn: pfn(page) },
            Call::Pin { pfn: page } => HostCall::TestPin { pfn: pfn(page) },
            Call::Unpin { pfn: page } => HostCall::TestUnpin { pfn: pfn(page) },
            _ => return None,
        })
    }

    /// What such a call came to.
    pub(crate) fn read(&mut self, call: Call, answer: Answer) -> Result<Outcome, Failure> {
        let Answer::Served(result) = answer else { return Err(failure!("{answer}")) };
        match (call, result.outcome, HostState::from_word(result.values[0])) {
            (Call::QueryPage { .. }, Ok(()), Some(state)) => Ok(Outcome::Page(state, result.values[1] == 1)),
            // The outcome of a call about one page that does not say so.
            (Call::Pin { .. } | Call::Unpin { .. }, Ok(()), _) => Ok(Outcome::Done(1)),
            _ => self.outcome(result),
        }
    }

    /// Makes a call on the hypervisor, as whoever makes it.
    pub(crate) fn real(&mut self, call: Call) -> Result<Outcome, Failure> {
        if let Some(plain) = self.plain(call) {
            let answer = self.deed.call(plain)?;
            return self.read(call, answer);
        }
        match call {
            Call::VmCreate { protected, immediate, root } => {
                self.create(protected, immediate, self.world.pfn.saturating_add(root))
            }
            Call::UnshareAck { vm, vcpu } => {
                let lives = self.state.vms.get(usize::from(vm)).is_some_and(|vm| vm.phase == Phase::Live);
                if lives && usize::from(vcpu) < VCPUS {
                    let by_run = self.chooser.dice.below(4) == 0;
                    self.acknowledge(vm, vcpu, by_run)
                } else {
                    self.host_call(HostCall::UnshareAck { vm: self.handle(vm), vcpu: vcpu.into() })
                }
            }
            Call::VmTeardownStart { vm } => {
                let outcome = self.host_call(HostCall::VmTeardownStart { vm: self.handle(vm) })?;
                if let Outcome::Done(_) = outcome {
                    self.take_image_back(vm)?;
                }
                Ok(outcome)
            }
            Call::VmTeardownFinish { vm } => self.finish(vm),
            Call::Share { vm, .. }
            | Call::Unshare { vm, .. }
            | Call::Relinquish { vm, .. }
            | Call::GuardMap { vm, .. }
            | Call::GuardUnmap { vm, .. } => self.guest_acts(vm, Act::Call(call)),
            Call::GuestStore { vm, gfn } => self.guest_store(vm, gfn, call),
            Call::HostStore { pfn: page } => self.host_store(page as usize),
            _ => Err(failure!("the host's books are not the hypervisor's")),
        }
    }

    /// Makes a host's call; its result in the specification's words.
    pub(crate) fn host_call(&mut self, call: HostCall) -> Result<Outcome, Failure> {
        match self.deed.call(call)? {
            Answer::Served(result) => self.outcome(result),
            other => Err(failure!("{call:?}: {other}")),
        }
    }

    fn outcome(&mut self, result: HostResult) -> Result<Outcome, Failure> {
        let [first, second, ..] = result.values;
        Ok(match result.outcome {
            Ok(()) => Outcome::Done(first),
            Err(Error::NoMemory) => {
                self.lacking = first;
                Outcome::Lacking(
                    Pool::from_word(second).ok_or_else(|| failure!("there is no pool {second}"))?,
                )
            }
            Err(error) if [first, second] == [0; 2] => Outcome::Refused(error),
            Err(error) => return Err(failure!("{error:?}, and x2 {first:#x}, x3 {second:#x}")),
        })
    }

    pub(crate) fn create(&mut self, protected: bool, immediate: bool, root: u64) -> Result<Outcome, Failure> {
        let flags = VmFlags { protected, unshare_immediate: immediate, mmio_unguarded: false };
        let unborn = self.state.vms.iter().position(|vm| vm.phase == Phase::Unborn);
        let Some(number) = unborn else {
            // The hypervisor has room for more VMs than the window.
            return Ok(Outcome::Refused(Error::Busy));
        };
        let word = match self.host_call(HostCall::VmCreate { flags, root })? {
            Outcome::Done(word) => word,
            refused => return Ok(refused),
        };
        let handle = VmHandle::from_word(word).ok_or_else(|| failure!("{word:#x} is no handle"))?;
        self.handles[number] = Some(handle);
        self.bring_up(number as u8, handle, protected)?;
        Ok(Outcome::Created(number as u8))
    }

    fn finish(&mut self, vm: u8) -> Result<Outcome, Failure> {
        let handle = self.handle(vm);
        let mut back = 0;
        loop {
            let call = HostCall::VmTeardownFinish { vm: handle };
            let Answer::Served(result) = self.deed.call(call)? else {
                return Err(failure!("it is not served"));
            };
            let [done, left, ..] = result.values;
            if result.outcome.is_err() {
                return self.outcome(result);
            }
            back += done;
            if left == 0 {
                break;
            }
        }
        let Some(mut guest) = self.guests.get_mut(usize::from(vm)).and_then(Option::take) else {
            return Err(failure!("a VM that was not made is gone"));
        };
        let hidden = guest.lent.len() as u64;
        self.supply.put_back(&mut guest.lent);
        self.spare_lists[usize::from(vm)] = guest.lent;
        Ok(Outcome::Ended(back.saturating_sub(hidden)))
    }

    pub(crate) fn guest_acts(&mut self, vm: u8, act: Act) -> Result<Outcome, Failure> {
        let lives = self.state.vms.get(usize::from(vm)).is_some_and(|vm| vm.phase == Phase::Live);
        if lives { self.act(vm, act) } else { Ok(Outcome::NotServed) }
    }

    pub(crate) fn guest_store(&mut self, vm: u8, gfn: u64, call: Call) -> Result<Outcome, Failure> {
        let act = Act::Call(call);
        let vcpu = self.vcpu_for(vm, act);
        let outcome = self.guest_acts(vm, act)?;
        if let (Outcome::Done(_), Some(vcpu), Some(page)) = (outcome, vcpu, self.page_of(vm, gfn)) {
            let (slot, value) = self.touch_of(vm, vcpu)?;
            self.content[page][slot] = value;
        }
        Ok(outcome)
    }

    pub(crate) fn host_store(&mut self, page: usize) -> Result<Outcome, Failure> {
        let (slot, value) = self.dice_touch();
        let at = self.address(page, slot);
        match self.deed.store(at, value)? {
            Touch::Done(_) => {
                self.content[page][slot] = value;
                Ok(Outcome::Done(1))
            }
            touch if touch.is_injected_abort(at) => {
                self.aborts += 1;
                Ok(Outcome::Aborted)
            }
            touch => Err(failure!("{touch}")),
        }
    }

    /// The page of the window that a guest has at a guest page.
    pub(crate) fn page_of(&self, vm: u8, gfn: u64) -> Option<usize> {
        match self.state.vms.get(usize::from(vm))?.entries.get(gfn as usize)? {
            GuestEntry::Page { pfn, .. } => Some(usize::from(*pfn)),
            _ => None,
        }
    }
}
