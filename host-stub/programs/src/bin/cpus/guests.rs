//! A guest's page goes while a vCPU of the guest uses it on another CPU, or, of a page that it shares, while another CPU
//! of the host's does.

use abi::exit::Access;
use abi::guest::{MEM_RELINQUISH, MEM_SHARE, MEM_UNSHARE};
use abi::page::Permissions;
use abi::{Error, Exit, HostCall};
use guest_stub::protocol::player::{LOAD, SPIN_LOAD, SPIN_STORE};
use host_programs::cpu::{Cpu, PATIENCE, WARM};
use host_programs::deed::{Answer, Deed, Touch};
use host_programs::player::{Player, report};
use host_programs::steps::{Steps, format};
use host_programs::{Failure, failure, sys};

/// Page of guest RAM in which the spinning vCPU counts, which the host can read.
const PROGRESS: u64 = 0x40;
/// Page on which it spins.
const PAGE: u64 = 0x50;

/// What the host writes to a shared page at first, and what CPU 1 stores to it.
const FIRST: u64 = 0x0f1e_2d3c_4b5a_6978;
const MARK: u64 = 0x1234_5678_9abc_def0;

/// A player whose second vCPU runs on CPU 1.
struct Story<'d> {
    deed: &'d Deed,
    cpu: Cpu<'d>,
    player: Player,
    /// The host's pages behind [`PROGRESS`] and [`PAGE`].
    progress: u64,
    page: u64,
}

impl<'d> Story<'d> {
    fn new(deed: &'d Deed, protected: bool) -> Result<Self, Failure> {
        let cpu = Cpu::on(deed, 1)?;
        let mut player = Player::new(deed, protected)?;
        let progress = deed.alloc(2)?;
        let page = progress + 1;
        player.give(deed, progress, PROGRESS, 1)?;
        player.give(deed, page, PAGE, 1)?;
        if protected {
            let done = player.ask(deed, 0, [MEM_SHARE.into(), Player::address(PROGRESS), 1, 0])?;
            if done != [0, 1, 0, 0] {
                return Err(failure!("the guest cannot share its page: {done:x?}"));
            }
        }
        Ok(Self { deed, cpu, player, progress, page })
    }

    /// The vCPU on CPU 1 begins to spin. Returns when it has done so for some time.
    fn spin(&mut self, command: u64) -> Result<(), Failure> {
        self.deed.store(self.progress << 12, 0)?;
        let (vm, to, progress) = (self.player.handle(), Player::address(PAGE), Player::address(PROGRESS));
        let series = self.cpu.series();
        series.clear();
        series.call(HostCall::VcpuRun { vm, vcpu: 1, values: [command, to, progress, 0] });
        self.cpu.play(1, false)?;
        let limit = sys::now() + PATIENCE;
        while self.count()? < WARM {
            if sys::now() > limit {
                return Err(failure!("the guest cannot reach its page"));
            }
        }
        Ok(())
    }

    fn count(&self) -> Result<u64, Failure> {
        match self.deed.load(self.progress << 12)? {
            Touch::Done(count) => Ok(count),
            abort => Err(failure!("the page in which the guest counts: {abort}")),
        }
    }

    /// The vCPU's exit, or, if it goes on spinning, how far.
    fn exit(&mut self) -> Result<Result<Exit, u64>, Failure> {
        let before = self.count()?;
        let limit = sys::now() + PATIENCE;
        while self.cpu.progress()?.playing {
            if sys::now() > limit {
                return Ok(Err(self.count()? - before));
            }
        }
        self.cpu.end(true)?;
        match self.cpu.series().answer(0) {
            Answer::Served(result) => Exit::from_words(result.values)
                .map(Ok)
                .ok_or_else(|| failure!("no exit: {:x?}", result.values)),
            answer => Err(failure!("the vCPU does not run: {answer}")),
        }
    }

    /// A step: the vCPU comes back, with an exit that fits.
    fn comes_back(
        &mut self,
        name: &str,
        expected: &str,
        fits: impl Fn(Exit) -> bool,
        steps: &mut Steps,
    ) -> Result<(), Failure> {
        match self.exit()? {
            Ok(exit) => {
                steps.check(name, expected, format_args!("{exit:x?}"), fits(exit));
                Ok(())
            }
            Err(more) => {
                steps.check(name, expected, format_args!("{more} more accesses"), false);
                Err(failure!("CPU 1 does not come back from its guest"))
            }
        }
    }

    fn end(self) -> Result<(), Failure> {
        self.cpu.off()?;
        self.player.end(self.deed, &[PROGRESS, PAGE])?;
        self.deed.free(self.progress, 2)
    }
}

/// The exit of an access to the page where there is no memory, in a VM that is not protected.
fn is_access(exit: Exit, stores: bool) -> bool {
    matches!(exit, Exit::Mmio { ipa, write, .. } if (ipa, write) == (Player::address(PAGE), stores))
}

/// What the player reports of an external abort without a change of level.
fn is_abort(exit: Exit) -> bool {
    const CLASS: u64 = 0x25;
    const EXTERNAL: u64 = 0x10;
    matches!(report(exit), Ok([1, syndrome, ..]) if syndrome >> 26 == CLASS && syndrome & 0x3f == EXTERNAL)
}

/// Pages that a guest loses.
pub(crate) fn lose(deed: &Deed, steps: &mut Steps) -> Result<(), Failure> {
    steps.tell("A vCPU uses a page on CPU 1; CPU 0 takes the page back from a VM without protection.");
    for (name, command, stores) in [
        ("a-vcpu-that-reads-loses-a-page-that-is-taken-back", SPIN_LOAD, false),
        ("a-vcpu-that-writes-loses-a-page-that-is-taken-back", SPIN_STORE, true),
    ] {
        let mut story = Story::new(deed, false)?;
        let vm = story.player.handle();
        story.spin(command)?;
        if !stores {
            busy(&story, steps)?;
        }
        deed.must(HostCall::UnshareGuest { vm, gfn: Player::gfn(PAGE), pages: 1 })?;
        story.comes_back(name, "a device's access", |exit| is_access(exit, stores), steps)?;
        if stores {
            fewer_rights(&mut story, steps)?;
        }
        story.end()?;
    }

    steps.tell("CPU 0 takes it by force from a protected VM.");
    for (name, command) in [
        ("a-vcpu-that-reads-finds-poison-where-a-page-was-taken", SPIN_LOAD),
        ("a-vcpu-that-writes-finds-poison-where-a-page-was-taken", SPIN_STORE),
    ] {
        let mut story = Story::new(deed, true)?;
        story.spin(command)?;
        deed.must(HostCall::ForceReclaim { pfn: story.page, pages: 1 })?;
        story.comes_back(name, "an external abort", is_abort, steps)?;
        let found = deed.load(story.page << 12)?;
        steps.check(
            &format(format_args!("{name}-and-the-host-zeros")),
            Touch::Done(0),
            found,
            found == Touch::Done(0),
        );
        story.end()?;
    }

    steps.tell("The guest itself gives it up on CPU 0.");
    for (name, command, access) in [
        ("a-vcpu-that-reads-loses-a-page-that-the-other-vcpu-relinquishes", SPIN_LOAD, Access::Read),
        ("a-vcpu-that-writes-loses-a-page-that-the-other-vcpu-relinquishes", SPIN_STORE, Access::Write),
    ] {
        let mut story = Story::new(deed, true)?;
        story.spin(command)?;
        let done = story.player.ask(deed, 0, [MEM_RELINQUISH.into(), Player::address(PAGE), 1, 0])?;
        if done != [0, 1, 0, 0] {
            return Err(failure!("the guest cannot relinquish its page: {done:x?}"));
        }
        let missing = Exit::MissingPage { ipa: Player::address(PAGE), access };
        story.comes_back(name, "a missing page", |exit| exit == missing, steps)?;
        story.end()?;
    }
    Ok(())
}

/// While the vCPU runs on CPU 1, it is nobody else's.
fn busy(story: &Story<'_>, steps: &mut Steps) -> Result<(), Failure> {
    let vm = story.player.handle();
    for (name, call) in [
        ("a-vcpu-runs-on-one-cpu-at-a-time", HostCall::VcpuRun { vm, vcpu: 1, values: [0; 4] }),
        ("a-running-vcpus-registers-are-not-the-hosts", HostCall::VcpuGetReg { vm, vcpu: 1, register: 0 }),
        ("a-vm-that-runs-does-not-begin-to-end", HostCall::VmTeardownStart { vm }),
    ] {
        let answer = story.deed.call(call)?;
        steps.check(name, Error::Busy, answer, answer.is_error(Error::Busy));
    }
    let report = story.player.ask(story.deed, 0, [LOAD, Player::address(PAGE), 0, 0])?;
    steps.equal("the-other-vcpu-runs-beside-it", 0, report[0]);
    Ok(())
}

/// The page is lent again, to be read only: the store that found nothing is made again, and refused.
fn fewer_rights(story: &mut Story<'_>, steps: &mut Steps) -> Result<(), Failure> {
    let (vm, gfn, pfn) = (story.player.handle(), Player::gfn(PAGE), story.page);
    let permissions = Permissions { write: false, execute: false };
    story.player.must(story.deed, HostCall::ShareGuest { vm, pfn, gfn, pages: 1, permissions })?;
    let exit = story.player.run(story.deed, 1, [0; 4])?;
    let expected = Exit::MissingPage { ipa: Player::address(PAGE), access: Access::Write };
    let seen = format_args!("{exit:x?}");
    steps.check(
        "and-does-not-write-to-it-when-it-may-only-read",
        "no page to write to",
        seen,
        exit == expected,
    );
    Ok(())
}

/// A page that a guest shares, and takes back.
pub(crate) fn unshare(deed: &Deed, steps: &mut Steps) -> Result<(), Failure> {
    steps.tell("CPU 1 uses a page that a guest has shared; the guest unshares it on CPU 0.");
    let mut story = Story::new(deed, true)?;
    let guest_page = Player::address(PAGE);
    for (round, stores, lost, kept) in [
        (1, None, "a-cpu-that-reads-loses-a-page-that-is-unshared", "the-guest-keeps-what-it-had"),
        (
            2,
            Some(MARK),
            "a-cpu-that-writes-loses-a-page-that-is-unshared",
            "the-guest-keeps-what-was-written",
        ),
    ] {
        let shared = story.player.ask(deed, 0, [MEM_SHARE.into(), guest_page, 1, 0])?;
        if shared != [0, 1, 0, 0] {
            return Err(failure!("the guest cannot share its page: {shared:x?}"));
        }
        if round == 1 {
            deed.store(story.page << 12, FIRST)?;
        }
        story.cpu.spin(story.page << 12, stores)?;
        let exit = story.player.run(deed, 0, [MEM_UNSHARE.into(), guest_page, 1, 0])?;
        if exit != (Exit::Unshare { ipa: guest_page, pages: 1 }) {
            return Err(failure!("the guest cannot ask for its page: {exit:x?}"));
        }
        // The host has been asked and has not answered: the page is still both's.
        let goes_on = story.cpu.goes_on()?;
        let name = format(format_args!("{lost}-and-not-before-the-host-agrees"));
        steps.check(&name, "goes on", if goes_on { "goes on" } else { "has ended" }, goes_on);
        deed.must(HostCall::UnshareAck { vm: story.player.handle(), vcpu: 0 })?;
        let spun = story.cpu.spun()?;
        steps.check(lost, "an injected abort", spun, spun.is_injected_abort(story.page << 12));
        let done = story.player.ask(deed, 0, [0; 4])?;
        if done != [0, 1, 0, 0] {
            return Err(failure!("the guest's unshare comes to {done:x?}"));
        }
        let [failed, value, ..] = story.player.ask(deed, 0, [LOAD, guest_page, 0, 0])?;
        steps.equal_hex(kept, if stores.is_none() { FIRST } else { MARK }, value | failed << 63);
    }
    story.end()
}
