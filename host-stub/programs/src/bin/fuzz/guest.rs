//! Real guests that play what they are told: making them, running them, and reading their exits as the
//! specification's outcomes.

extern crate alloc;

use alloc::vec::Vec;

use abi::exit::Access;
use abi::guest::{MEM_RELINQUISH, MEM_SHARE, MEM_UNSHARE, MMIO_GUARD_MAP, MMIO_GUARD_UNMAP, PTP};
use abi::page::{Permissions, Pool};
use abi::smccc::{INVALID_PARAMETER, NOT_SUPPORTED, SUCCESS};
use abi::{Error, Exit, HostCall, VmHandle};
use guest_stub::protocol::player::{FETCH, IMAGE_PAGES, LOAD, START, STORE};
use guest_stub::protocol::{PAGE_SIZE, RAM_BASE};
use host_programs::deed::Answer;
use host_programs::{Failure, failure};
use spec::state::VCPUS;
use spec::{Call, Outcome, Run};

use crate::play::Play;
use crate::watch::OFFSETS;

/// What a vCPU is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Doing {
    /// It waits for its next command.
    Asks,
    /// It made this call, or this access, and something must come first: it makes it again.
    Again(Act),
    /// Its unshare waits for the host.
    Unshares,
}

/// What a guest does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Act {
    /// A call of the specification.
    Call(Call),
    /// A load.
    Load { gfn: u64 },
    /// An instruction fetch.
    Fetch { gfn: u64 },
}

/// A guest, as its host knows it.
#[derive(Debug)]
pub(crate) struct Guest {
    pub(crate) handle: VmHandle,
    pub(crate) protected: bool,
    /// Pages that its tables got behind the specification's back.
    pub(crate) lent: Vec<u64>,
    /// First page of its image.
    pub(crate) image: u64,
    pub(crate) doing: [Doing; VCPUS],
    /// Offset and value of the access that each vCPU makes.
    touch: [(usize, u64); VCPUS],
}

impl Guest {
    /// Offset and value of the access that a vCPU makes, or has just made.
    pub(crate) fn last_touch(&self, vcpu: u8) -> (usize, u64) {
        self.touch[usize::from(vcpu)]
    }
}

/// What a device answers that the host plays.
const DEVICE_ANSWER: u64 = 0x5ca1_ab1e_0dd5_ba11;

impl Play<'_> {
    /// Makes the guest of a VM that was just made: two vCPUs that ask for commands.
    pub(crate) fn bring_up(&mut self, number: u8, handle: VmHandle, protected: bool) -> Result<(), Failure> {
        let image = self.supply.image_for(self.deed, self.series, number)?;
        let lent = core::mem::take(&mut self.spare_lists[usize::from(number)]);
        let guest =
            Guest { handle, protected, lent, image, doing: [Doing::Asks; VCPUS], touch: [(0, 0); VCPUS] };
        self.guests[usize::from(number)] = Some(guest);
        for vcpu in 0..VCPUS as u64 {
            self.behind(number, HostCall::VcpuCreate { vm: handle, vcpu })?;
        }
        let gfn = RAM_BASE / PAGE_SIZE;
        let (vm, pfn, pages) = (handle, image, IMAGE_PAGES);
        let done = if protected {
            self.behind(number, HostCall::DonateGuest { vm, pfn, gfn, pages })?
        } else {
            self.behind(number, HostCall::ShareGuest { vm, pfn, gfn, pages, permissions: Permissions::ALL })?
        };
        if done != IMAGE_PAGES {
            return Err(failure!("{done} of {IMAGE_PAGES} pages of a guest's image were given"));
        }
        self.behind(number, HostCall::VcpuSetBoot { vm, vcpu: 0, pc: RAM_BASE, x0: 0 })?;
        self.expect(number, 0, [0; 4], |exit| matches!(exit, Exit::GuestCall { .. }))?;
        self.expect(number, 0, [START, 0, 0, 0], |exit| exit == Exit::CpuOn { vcpu: 1 })?;
        self.expect(number, 0, [0; 4], |exit| matches!(exit, Exit::GuestCall { .. }))?;
        self.expect(number, 1, [0; 4], |exit| matches!(exit, Exit::GuestCall { .. }))
    }

    /// A call that the specification knows nothing of and that must succeed. Returns x2.
    pub(crate) fn behind(&mut self, number: u8, call: HostCall) -> Result<u64, Failure> {
        for _ in 0..16 {
            let Answer::Served(result) = self.deed.call(call)? else { break };
            let [first, second, ..] = result.values;
            match result.outcome {
                Ok(()) => return Ok(first),
                Err(Error::NoMemory) => {
                    let pool =
                        Pool::from_word(second).ok_or_else(|| failure!("there is no pool {second}"))?;
                    self.serve_lack(pool, first, Some(number))?;
                }
                Err(error) => return Err(failure!("{call:?}: {error}")),
            }
        }
        Err(failure!("{call:?} is not served"))
    }

    /// The guest of a number that has one.
    pub(crate) fn guest(&mut self, number: u8) -> Result<&mut Guest, Failure> {
        let guest = self.guests.get_mut(usize::from(number)).and_then(Option::as_mut);
        guest.ok_or_else(|| failure!("VM {number} has no guest"))
    }

    /// Runs a vCPU to its next exit but for interrupts.
    pub(crate) fn enter(&mut self, number: u8, vcpu: u8, mut values: [u64; 4]) -> Result<Exit, Failure> {
        let vm = self.guest(number)?.handle;
        loop {
            let answer = self.deed.call(HostCall::VcpuRun { vm, vcpu: vcpu.into(), values })?;
            let result =
                answer.ok().ok_or_else(|| failure!("VM {number}, vCPU {vcpu} does not run: {answer}"))?;
            match Exit::from_words(result.values) {
                Some(Exit::Interrupted) => values = [0; 4],
                Some(exit) => return Ok(exit),
                None => return Err(failure!("no exit: {:x?}", result.values)),
            }
        }
    }

    fn expect(
        &mut self,
        number: u8,
        vcpu: u8,
        values: [u64; 4],
        fits: impl FnOnce(Exit) -> bool,
    ) -> Result<(), Failure> {
        let exit = self.enter(number, vcpu, values)?;
        if fits(exit) { Ok(()) } else { Err(failure!("VM {number}, vCPU {vcpu} exits with {exit:x?}")) }
    }

    /// The vCPU that can do this: one that makes the same again, else one that asks for commands.
    pub(crate) fn vcpu_for(&self, number: u8, act: Act) -> Option<u8> {
        let guest = self.guests.get(usize::from(number))?.as_ref()?;
        let wanted = match act {
            Act::Call(Call::Unshare { vcpu, .. }) => Some(usize::from(vcpu)),
            // Its record of expected exceptions serves one vCPU only.
            Act::Fetch { .. } => Some(0),
            _ => None,
        };
        let ours = |vcpu: &usize| wanted.is_none_or(|wanted| wanted == *vcpu);
        let mut all = (0..VCPUS).filter(ours);
        let again = all.clone().find(|vcpu| guest.doing[*vcpu] == Doing::Again(act));
        again.or_else(|| all.find(|vcpu| guest.doing[*vcpu] == Doing::Asks)).map(|vcpu| vcpu as u8)
    }

    /// A vCPU that is in the middle of something that it must do again, and what.
    pub(crate) fn stuck(&self, number: u8, vcpu: u8) -> Option<Act> {
        match self.guests.get(usize::from(number))?.as_ref()?.doing[usize::from(vcpu)] {
            Doing::Again(act) => Some(act),
            _ => None,
        }
    }

    /// A guest does something; what comes of it, in the specification's words. `Done` of a load is its value.
    pub(crate) fn act(&mut self, number: u8, act: Act) -> Result<Outcome, Failure> {
        let Some((vcpu, command)) = self.begin_act(number, act)? else { return Ok(Outcome::NotServed) };
        let exit = self.enter(number, vcpu, command)?;
        self.end_act(number, vcpu, act, exit)
    }

    /// The vCPU that does it, and the values with which it must run; `None` if there is none.
    pub(crate) fn begin_act(&mut self, number: u8, act: Act) -> Result<Option<(u8, [u64; 4])>, Failure> {
        let Some(vcpu) = self.vcpu_for(number, act) else { return Ok(None) };
        let place = usize::from(vcpu);
        let again = self.guest(number)?.doing[place] != Doing::Asks;
        if !again {
            let touch = self.some_touch(act);
            self.guest(number)?.touch[place] = touch;
        }
        let (slot, value) = self.guest(number)?.touch[place];
        Ok(Some((vcpu, if again { [0; 4] } else { self.command(act, slot, value) })))
    }

    /// What came of it, by the exit of that run.
    pub(crate) fn end_act(
        &mut self,
        number: u8,
        vcpu: u8,
        act: Act,
        mut exit: Exit,
    ) -> Result<Outcome, Failure> {
        let place = usize::from(vcpu);
        let (slot, value) = self.guest(number)?.touch[place];
        let mut device = None;
        if let Exit::Mmio { ipa, size, write, value: stored } = exit {
            device = Some(self.device_access(act, (ipa, size, write, stored), (slot, value))?);
            exit = self.enter(number, vcpu, [DEVICE_ANSWER, 0, 0, 0])?;
        }
        let (doing, outcome) = self.read_exit(act, exit)?;
        self.guest(number)?.doing[place] = doing;
        match device {
            // The access is over.
            Some(gfn) if doing == Doing::Asks => match (act, outcome) {
                (Act::Load { .. }, Outcome::Done(loaded)) if loaded != DEVICE_ANSWER => {
                    Err(failure!("a guest's load from a device gives {loaded:#x}"))
                }
                _ => Ok(Outcome::Device(gfn)),
            },
            Some(_) => Err(failure!("a device's access is not over, but: {exit:x?}")),
            None => Ok(outcome),
        }
    }

    /// Offset and value of an access that begins.
    fn some_touch(&mut self, act: Act) -> (usize, u64) {
        match act {
            Act::Fetch { .. } => (crate::watch::CODE_SLOT, 0),
            _ => self.dice_touch(),
        }
    }

    fn command(&self, act: Act, slot: usize, value: u64) -> [u64; 4] {
        let ipa = |gfn: u64| self.world.gfn.saturating_add(gfn) << 12;
        let call = |function: u32, gfns: Run| [u64::from(function), ipa(gfns.first), gfns.count, 0];
        match act {
            Act::Call(Call::Share { gfns, .. }) => call(MEM_SHARE, gfns),
            Act::Call(Call::Unshare { gfns, .. }) => call(MEM_UNSHARE, gfns),
            Act::Call(Call::Relinquish { gfns, .. }) => call(MEM_RELINQUISH, gfns),
            Act::Call(Call::GuardMap { gfns, .. }) => call(MMIO_GUARD_MAP, gfns),
            Act::Call(Call::GuardUnmap { gfns, .. }) => call(MMIO_GUARD_UNMAP, gfns),
            Act::Call(Call::GuestStore { gfn, .. }) => [STORE, ipa(gfn) + OFFSETS[slot], value, 0],
            Act::Load { gfn } => [LOAD, ipa(gfn) + OFFSETS[slot], 0, 0],
            Act::Fetch { gfn } => [FETCH, ipa(gfn) + OFFSETS[slot], 0, 0],
            Act::Call(_) => [0; 4],
        }
    }

    /// Checks what an access to a device shows to the host; returns its guest page.
    fn device_access(
        &self,
        act: Act,
        (ipa, size, write, stored): (u64, u8, bool, u64),
        (slot, value): (usize, u64),
    ) -> Result<u64, Failure> {
        let (gfn, expected) = match act {
            Act::Call(Call::GuestStore { gfn, .. }) => (gfn, (true, value)),
            Act::Load { gfn } => (gfn, (false, 0)),
            _ => return Err(failure!("{act:?} is shown as an access to a device at {ipa:#x}")),
        };
        let at = (self.world.gfn + gfn) << 12 | OFFSETS[slot];
        if (ipa, size, write, stored) != (at, 8, expected.0, expected.1) {
            return Err(failure!(
                "{act:?} is shown as an access at {ipa:#x}, {size} bytes, write {write}, value {stored:#x}"
            ));
        }
        Ok(gfn)
    }

    /// What an exit means for the vCPU, and to the specification.
    fn read_exit(&mut self, act: Act, exit: Exit) -> Result<(Doing, Outcome), Failure> {
        let strange = || failure!("{act:?} exits with {exit:x?}");
        Ok(match exit {
            Exit::GuestCall { arguments: [function, report @ .., 0, 0] } if function == u64::from(PTP) => {
                (Doing::Asks, read_report(act, report).ok_or_else(strange)?)
            }
            Exit::MissingPage { ipa, access } => {
                let expected = match act {
                    Act::Load { .. } => Access::Read,
                    Act::Fetch { .. } => Access::Execute,
                    Act::Call(_) => Access::Write,
                };
                if access != expected || ipa % PAGE_SIZE != 0 {
                    return Err(strange());
                }
                let gfn = (ipa / PAGE_SIZE).checked_sub(self.world.gfn).ok_or_else(strange)?;
                (Doing::Again(act), Outcome::Missing(gfn))
            }
            Exit::NeedPages { pool, pages } => {
                self.lacking = pages;
                (Doing::Again(act), Outcome::Lacking(pool))
            }
            Exit::Unshare { ipa, pages } => {
                let Act::Call(Call::Unshare { gfns, .. }) = act else { return Err(strange()) };
                if ipa != (self.world.gfn + gfns.first) << 12 {
                    return Err(strange());
                }
                (Doing::Unshares, Outcome::Asked(pages))
            }
            _ => return Err(strange()),
        })
    }

    /// The host acknowledges an unshare, by its own call or by running the vCPU, and the guest tells its result.
    pub(crate) fn acknowledge(&mut self, number: u8, vcpu: u8, by_run: bool) -> Result<Outcome, Failure> {
        let waits = self.guest(number)?.doing[usize::from(vcpu)] == Doing::Unshares;
        let mut acknowledged = None;
        if !(by_run && waits) {
            let vm = self.guest(number)?.handle;
            let outcome = self.host_call(HostCall::UnshareAck { vm, vcpu: vcpu.into() })?;
            let Outcome::Done(done) = outcome else { return Ok(outcome) };
            acknowledged = Some(done);
        }
        let exit = self.enter(number, vcpu, [0; 4])?;
        let told = match exit {
            Exit::NeedPages { pool, pages } if acknowledged.is_none() => {
                self.lacking = pages;
                return Ok(Outcome::Lacking(pool));
            }
            Exit::GuestCall { arguments: [_, SUCCESS, done, ..] } => done,
            Exit::GuestCall { arguments: [_, INVALID_PARAMETER, ..] } => 0,
            _ => return Err(failure!("an unshare that is over exits with {exit:x?}")),
        };
        self.guest(number)?.doing[usize::from(vcpu)] = Doing::Asks;
        match acknowledged {
            Some(done) if done != told => {
                Err(failure!("{done} pages were unshared, and the guest is told {told}"))
            }
            _ => Ok(Outcome::Done(told)),
        }
    }

    /// Takes a dying guest's image back.
    pub(crate) fn take_image_back(&mut self, number: u8) -> Result<(), Failure> {
        let (vm, protected, image) = {
            let guest = self.guest(number)?;
            (guest.handle, guest.protected, guest.image)
        };
        let mut done = 0;
        while done < IMAGE_PAGES {
            let (gfn, pages) = (RAM_BASE / PAGE_SIZE + done, IMAGE_PAGES - done);
            let call = if protected {
                HostCall::ReclaimGuest { vm, gfn, pages }
            } else {
                HostCall::UnshareGuest { vm, gfn, pages }
            };
            match self.behind(number, call)? {
                0 => return Err(failure!("{call:?} does nothing")),
                more => done += more,
            }
        }
        self.series.clear();
        (0..IMAGE_PAGES).for_each(|page| _ = self.series.load((image + page) << 12));
        self.deed.series(self.series)?;
        for page in 0..IMAGE_PAGES as usize {
            match self.series.touched(page) {
                host_programs::deed::Touch::Done(value) if value == 0 || !protected => {}
                other => return Err(failure!("page {page} of a dead guest's image: {other}")),
            }
        }
        Ok(())
    }

    /// A vCPU that asks for commands.
    pub(crate) fn idle_vcpu(&self, vm: u8) -> Option<u8> {
        let guest = self.guests.get(usize::from(vm))?.as_ref()?;
        (0..VCPUS as u8).find(|vcpu| guest.doing[usize::from(*vcpu)] == Doing::Asks)
    }

    pub(crate) fn touch_of(&mut self, vm: u8, vcpu: u8) -> Result<(usize, u64), Failure> {
        Ok(self.guest(vm)?.last_touch(vcpu))
    }

    /// Whether an access of a VM to a page of no memory is a device's.
    pub(crate) fn is_device(&self, number: u8, gfn: u64) -> bool {
        let vm = &self.state.vms[usize::from(number)];
        spec::is_device(vm.protected, vm.entries[gfn as usize])
    }
}

/// What a guest reports of what it did; `None` if that is no report of such an act.
fn read_report(act: Act, report: [u64; 4]) -> Option<Outcome> {
    /// ESR_EL1.EC of an abort that is taken without a change of level.
    const FETCH_ABORT: u64 = 0x21;
    const DATA_ABORT: u64 = 0x25;
    let [first, second, third, fourth] = report;
    match act {
        Act::Call(Call::GuestStore { .. }) => match report {
            [0, 0, 0, 0] => Some(Outcome::Done(1)),
            _ => is_external(report, DATA_ABORT).then_some(Outcome::Aborted),
        },
        Act::Load { .. } if first == 0 => Some(Outcome::Done(second)),
        Act::Load { .. } => is_external(report, DATA_ABORT).then_some(Outcome::Aborted),
        Act::Fetch { .. } if first == 0 => Some(Outcome::Done(0)),
        Act::Fetch { .. } => is_external(report, FETCH_ABORT).then_some(Outcome::Aborted),
        Act::Call(_) => match (first, second, third, fourth) {
            (SUCCESS, done, 0, 0) => Some(Outcome::Done(done)),
            (INVALID_PARAMETER, 0, 0, 0) => Some(Outcome::InvalidParameter),
            (NOT_SUPPORTED, ..) => Some(Outcome::NotServed),
            _ => None,
        },
    }
}

/// Whether a guest reports a synchronous external abort of this class.
fn is_external([first, syndrome, ..]: [u64; 4], class: u64) -> bool {
    const EXTERNAL: u64 = 0b01_0000;
    first == 1 && syndrome >> 26 & 0x3f == class && syndrome & 0x3f == EXTERNAL
}
