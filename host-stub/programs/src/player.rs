//! A guest that does what it is told, on two vCPUs, in a VM that is made by host calls alone.

use abi::page::Permissions;
use abi::{Exit, HostCall, VmFlags, VmHandle};
use guest_stub::protocol::player::{IMAGE_PAGES, START};
use guest_stub::protocol::{PAGE_SIZE, RAM_BASE};

use crate::deed::Deed;
use crate::raw_vm::RawVm;
use crate::series::Series;
use crate::sys::File;
use crate::{Failure, failure};

/// First page of guest RAM.
const FIRST_GFN: u64 = RAM_BASE / PAGE_SIZE;

/// The guest. Both its vCPUs wait for a command.
#[derive(Debug)]
pub struct Player {
    vm: RawVm,
    image: u64,
    protected: bool,
}

impl Player {
    /// Makes one.
    pub fn new(deed: &Deed, protected: bool) -> Result<Self, Failure> {
        let image = deed.alloc(IMAGE_PAGES)?;
        write_image(deed, &mut Series::default(), image)?;
        let vm = RawVm::new(deed, VmFlags { protected, ..VmFlags::default() })?;
        let mut player = Self { vm, image, protected };
        for vcpu in 0..2 {
            player.vm.vcpu(deed, vcpu)?;
        }
        player.give(deed, image, 0, IMAGE_PAGES)?;
        let vm = player.handle();
        player.must(deed, HostCall::VcpuSetBoot { vm, vcpu: 0, pc: RAM_BASE, x0: 0 })?;
        player.ask(deed, 0, [0; 4])?;
        match player.run(deed, 0, [START, 0, 0, 0])? {
            Exit::CpuOn { vcpu: 1 } => {}
            exit => return Err(failure!("the player's second vCPU does not start: {exit:x?}")),
        }
        player.ask(deed, 0, [0; 4])?;
        player.ask(deed, 1, [0; 4])?;
        Ok(player)
    }

    /// Its VM.
    pub fn handle(&self) -> VmHandle {
        self.vm.handle()
    }

    /// Number of the guest's page `page`, counted from the start of its RAM.
    pub fn gfn(page: u64) -> u64 {
        FIRST_GFN + page
    }

    /// Address of it.
    pub fn address(page: u64) -> u64 {
        Self::gfn(page) * PAGE_SIZE
    }

    /// A call for its VM that must succeed, with pages for its tables.
    pub fn must(&mut self, deed: &Deed, call: HostCall) -> Result<(), Failure> {
        self.vm.must(deed, call)
    }

    /// Gives pages for its tables.
    pub fn give_tables(&mut self, deed: &Deed, pages: u64) -> Result<(), Failure> {
        self.vm.give_tables(deed, pages)
    }

    /// Gives it pages: donates them, or lends them with all permissions where it is not protected.
    pub fn give(&mut self, deed: &Deed, pfn: u64, page: u64, pages: u64) -> Result<(), Failure> {
        let (vm, protected) = (self.handle(), self.protected);
        // A call ends at the end of its chunk: the rest is another's.
        let mut done = 0;
        while done < pages {
            let (pfn, gfn, pages) = (pfn + done, Self::gfn(page) + done, pages - done);
            done += self.vm.done(
                deed,
                if protected {
                    HostCall::DonateGuest { vm, pfn, gfn, pages }
                } else {
                    HostCall::ShareGuest { vm, pfn, gfn, pages, permissions: Permissions::ALL }
                },
            )?;
        }
        Ok(())
    }

    /// Runs a vCPU with these values until it exits for another reason than an interrupt of the host's.
    pub fn run(&self, deed: &Deed, vcpu: u64, mut values: [u64; 4]) -> Result<Exit, Failure> {
        loop {
            let results = deed.must(HostCall::VcpuRun { vm: self.handle(), vcpu, values })?;
            match Exit::from_words(results) {
                Some(Exit::Interrupted) => values = [0; 4],
                Some(exit) => return Ok(exit),
                None => return Err(failure!("no exit: {results:x?}")),
            }
        }
    }

    /// Gives a vCPU a command; returns what it reports of it when it asks for the next.
    pub fn ask(&self, deed: &Deed, vcpu: u64, command: [u64; 4]) -> Result<[u64; 4], Failure> {
        report(self.run(deed, vcpu, command)?)
    }

    /// Ends it, and takes its image and these pages of its RAM back, of which some may be gone already.
    pub fn end(self, deed: &Deed, pages: &[u64]) -> Result<(), Failure> {
        deed.must(HostCall::VmTeardownStart { vm: self.handle() })?;
        self.take_apart(deed, pages)
    }

    /// The same, once its end has begun.
    pub fn take_apart(self, deed: &Deed, pages: &[u64]) -> Result<(), Failure> {
        let mut done = 0;
        while done < IMAGE_PAGES {
            let [more, ..] = deed.must(self.take_back(done, IMAGE_PAGES - done))?;
            done += more;
        }
        for page in pages {
            let answer = deed.call(self.take_back(*page, 1))?;
            if answer.ok().is_none() && !answer.is_error(abi::Error::NoEntry) {
                return Err(failure!("page {page:#x} of a guest that has ended: {answer}"));
            }
        }
        deed.free(self.image, IMAGE_PAGES)?;
        self.vm.finish(deed)
    }

    fn take_back(&self, page: u64, pages: u64) -> HostCall {
        let (vm, gfn) = (self.handle(), Self::gfn(page));
        if self.protected {
            HostCall::ReclaimGuest { vm, gfn, pages }
        } else {
            HostCall::UnshareGuest { vm, gfn, pages }
        }
    }
}

/// What a vCPU reports that asks for its next command.
pub fn report(exit: Exit) -> Result<[u64; 4], Failure> {
    match exit {
        Exit::GuestCall { arguments: [_, a, b, c, d, ..] } => Ok([a, b, c, d]),
        exit => Err(failure!("the player should ask for a command, but: {exit:x?}")),
    }
}

/// Writes the guest's image to its pages, which are the host's.
pub fn write_image(deed: &Deed, series: &mut Series, image: u64) -> Result<(), Failure> {
    let bytes = File::open("/guests/player.bin")?.read_all()?;
    let room = (IMAGE_PAGES * PAGE_SIZE) as usize;
    if bytes.len() > room {
        return Err(failure!("the guest's image has {} bytes, and room for {room}", bytes.len()));
    }
    let words = room / 8;
    for first in (0..words).step_by(Series::MAX) {
        series.clear();
        for word in first..first + Series::MAX {
            let piece = bytes.get(word * 8..).unwrap_or_default();
            let value = piece.iter().take(8).rev().fold(0, |word, byte| word << 8 | u64::from(*byte));
            series.store(image * PAGE_SIZE + word as u64 * 8, value);
        }
        deed.series(series)?;
    }
    Ok(())
}
