//! Two calls at the same time, each on a CPU of its own: what comes of them must be what the specification says of one
//! and then the other, in one of the two orders.

use abi::{Exit, HostCall};
use host_programs::deed::Answer;
use host_programs::{Failure, failure};
use spec::state::Phase;
use spec::{Call, Outcome, Run, State, step};

use crate::guest::Act;
use crate::play::{G, P, Play, V};

/// Choices for the other CPU's call until one is about the same pages or VM.
const CHOICES: usize = 8;
/// Loads before a call at most, so that now one, now the other is the first.
const SKEW: u64 = 8;

/// A call of the other CPU.
#[derive(Clone, Copy)]
enum Made {
    /// The host's.
    Host(HostCall),
    /// A guest's, by a run of this vCPU.
    Guest { vm: u8, vcpu: u8, act: Act, run: HostCall },
}

/// What two calls come to in one order: both outcomes, and the states behind each.
type Course = ([Outcome; 2], [State<P, V, G>; 2]);

impl Play<'_> {
    /// Makes two calls at once, if there are two that can be.
    pub(crate) fn duel(&mut self) -> Result<(), Failure> {
        let Some((ours, plain)) = self.choose_for_host() else { return Ok(()) };
        let Some(theirs) = self.choose_against(ours) else { return Ok(()) };
        let Some(made) = self.prepare(theirs)? else { return Ok(()) };
        let (mine, other) = self.make_both(plain, made)?;

        let fail = |call: Call| move |failure: Failure| failure!("{call}: {failure}");
        let real = self.read(ours, mine).map_err(fail(ours))?;
        let lacked = self.lacking;
        let their = match made {
            Made::Host(_) => self.read(theirs, other).map_err(fail(theirs))?,
            Made::Guest { vm, vcpu, act, .. } => {
                let exit = self.exit(vm, vcpu, other)?;
                self.end_act(vm, vcpu, act, exit).map_err(fail(theirs))?
            }
        };
        let their_lack = self.lacking;

        let pairs = [(ours, real), (theirs, their)];
        let [first, second] = pairs;
        let (forth, back) = (self.course([first, second]), self.course([second, first]));
        let (order, [between, after]) = match (forth.0 == [real, their], back.0 == [their, real]) {
            // As of a donation and of giving up what is there: what they say is the same in both orders, what is
            // left is not.
            (true, true) if forth.1[1] != back.1[1] && !self.is_in(&forth.1[1], &back.1[1])? => {
                ([second, first], back.1)
            }
            (true, _) => ([first, second], forth.1),
            (false, true) => ([second, first], back.1),
            (false, false) => {
                return Err(failure!(
                    "{ours} came to: {real}, and at once on another CPU {theirs} to: {their}; the specification says: \
                     {} and {} in this order, {} and {} in the other",
                    forth.0[0],
                    forth.0[1],
                    back.0[1],
                    back.0[0]
                ));
            }
        };
        self.duels[0] += 1;
        self.duels[1] += u64::from(order != pairs);
        self.tale.note_together(order);
        let before = self.state;
        for state in [between, after] {
            self.state = state;
            self.forget_wiped();
        }
        self.look_at_changes(&before)?;
        for (outcome, pages, call) in [(real, lacked, ours), (their, their_lack, theirs)] {
            if let Outcome::Lacking(pool) = outcome {
                self.serve_lack(pool, pages, call.vm())?;
            }
        }
        self.serve_missing(theirs, their)
    }

    /// What the specification says of these calls, one after the other, where each lacks what it did lack.
    fn course(&self, calls: [(Call, Outcome); 2]) -> Course {
        let lack = |outcome| if let Outcome::Lacking(pool) = outcome { Some(pool) } else { None };
        let [(one, its), (other, others)] = calls;
        let (first, between) = step(&self.world, &self.state, one, lack(its));
        let (second, after) = step(&self.world, &between, other, lack(others));
        ([first, second], [between, after])
    }

    /// A call of the host's that is nothing but a call.
    fn choose_for_host(&mut self) -> Option<(Call, HostCall)> {
        let call = self.chooser.choose(&self.state);
        let call = self.fit(call)?;
        Some((call, self.plain(call)?))
    }

    /// A call of a guest's or the host's for the other CPU, if possible about the same pages or VM.
    fn choose_against(&mut self, ours: Call) -> Option<Call> {
        let mut chosen = None;
        for _ in 0..CHOICES {
            let call = self.chooser.choose(&self.state);
            let Some(call) = self.fit(call).filter(|call| self.can_be_others(*call)) else { continue };
            chosen = Some(call);
            let same_vm = call.vm().is_some() && call.vm() == ours.vm();
            if self.pages_of(call) & self.pages_of(ours) != 0 || same_vm {
                break;
            }
        }
        chosen
    }

    fn can_be_others(&self, call: Call) -> bool {
        self.plain(call).is_some() || self.guest_act(call).is_some()
    }

    /// A guest's call that changes whose pages are. What a store leaves behind depends on more than the order.
    fn guest_act(&self, call: Call) -> Option<(u8, Act)> {
        match call {
            Call::Share { vm, .. }
            | Call::Unshare { vm, .. }
            | Call::Relinquish { vm, .. }
            | Call::GuardMap { vm, .. }
            | Call::GuardUnmap { vm, .. } => {
                let lives = self.state.vms.get(usize::from(vm)).is_some_and(|vm| vm.phase == Phase::Live);
                let act = Act::Call(call);
                (lives && self.vcpu_for(vm, act).is_some()).then_some((vm, act))
            }
            _ => None,
        }
    }

    /// The pages of the window that a call is about, as bits.
    fn pages_of(&self, call: Call) -> u64 {
        let bits = |run: Run| (run.first..run.first.saturating_add(run.count.min(P as u64))).fold(0, set);
        let guests = |vm: u8, gfns: Run| {
            let gfns = gfns.first..gfns.first.saturating_add(gfns.count.min(G as u64));
            gfns.filter_map(|gfn| self.page_of(vm, gfn)).map(|page| page as u64).fold(0, set)
        };
        match call {
            Call::VmTopUp { pfns, .. }
            | Call::PoolTopUp { pfns, .. }
            | Call::ShareHyp { pfns }
            | Call::UnshareHyp { pfns }
            | Call::ForceReclaim { pfns } => bits(pfns),
            Call::DonateGuest { pfn, count, .. } | Call::ShareGuest { pfn, count, .. } => {
                bits(Run { first: pfn, count })
            }
            Call::QueryPage { pfn } | Call::Pin { pfn } | Call::Unpin { pfn } => bits(Run::one(pfn)),
            Call::UnshareGuest { vm, gfns }
            | Call::ReclaimGuest { vm, gfns }
            | Call::Share { vm, gfns }
            | Call::Unshare { vm, gfns, .. }
            | Call::Relinquish { vm, gfns }
            | Call::GuardMap { vm, gfns }
            | Call::GuardUnmap { vm, gfns } => guests(vm, gfns),
            _ => 0,
        }
    }

    fn prepare(&mut self, call: Call) -> Result<Option<Made>, Failure> {
        if let Some(plain) = self.plain(call) {
            return Ok(Some(Made::Host(plain)));
        }
        let Some((vm, act)) = self.guest_act(call) else { return Ok(None) };
        let Some((vcpu, values)) = self.begin_act(vm, act)? else { return Ok(None) };
        let run = HostCall::VcpuRun { vm: self.guest(vm)?.handle, vcpu: vcpu.into(), values };
        Ok(Some(Made::Guest { vm, vcpu, act, run }))
    }

    /// Makes both calls: the other CPU waits for a word that this one stores right before its own.
    fn make_both(&mut self, ours: HostCall, made: Made) -> Result<(Answer, Answer), Failure> {
        let (call, flag) = match made {
            Made::Host(call) | Made::Guest { run: call, .. } => (call, self.supply.flag()),
        };
        let skews = [(); 2].map(|()| self.chooser.dice.below(SKEW));
        let Some(cpu) = &mut self.other else { return Err(failure!("there is one CPU")) };
        self.deed.store(flag, 0)?;
        let series = cpu.series();
        series.clear();
        series.wait_for(flag, 1);
        (0..skews[0]).for_each(|_| _ = series.load(flag));
        let theirs = series.call(call);
        cpu.play(1, false)?;
        self.series.clear();
        self.series.store(flag, 1);
        (0..skews[1]).for_each(|_| _ = self.series.load(flag));
        let mine = self.series.call(ours);
        self.deed.series(self.series)?;
        cpu.end(true)?;
        Ok((self.series.answer(mine), cpu.series().answer(theirs)))
    }

    /// The exit of a vCPU that ran on the other CPU.
    fn exit(&mut self, vm: u8, vcpu: u8, answer: Answer) -> Result<Exit, Failure> {
        let result = answer.ok().ok_or_else(|| failure!("VM {vm}, vCPU {vcpu} does not run: {answer}"))?;
        match Exit::from_words(result.values) {
            Some(Exit::Interrupted) => self.enter(vm, vcpu, [0; 4]),
            Some(exit) => Ok(exit),
            None => Err(failure!("no exit: {:x?}", result.values)),
        }
    }
}

fn set(bits: u64, page: u64) -> u64 {
    bits | 1u64.checked_shl(page as u32).unwrap_or(0)
}
