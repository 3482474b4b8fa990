//! What Deed reads from the device tree: memory, reservations, boot modules, and the nodes that the host must
//! not see as they are.
//!
//! One pass over the tokens. The reader is Deed's own, on the tokens that [`super::edit`] needs anyway:
//! reading with `dtoolkit` took three quarters of the instructions of a whole boot. It stays in the tests, as
//! the parser that had no part in this.

use super::blob::{Source, Token};
use super::region::Region;
use crate::cpus::MAX_CPUS;
use arrayvec::ArrayVec;

/// Runs of RAM that Deed can hold.
pub const MAX_RAM: usize = 16;
/// Reservations that Deed can hold.
pub const MAX_RESERVED: usize = 16;
/// Device register ranges that can be withheld from the host.
pub const MAX_WITHHELD: usize = 8;
/// Boot modules that can be looked at.
pub const MAX_MODULES: usize = 8;
/// Nodes below the root that can be left out of the host's tree.
pub const MAX_DROPPED: usize = 8;
/// Interrupt controllers below the root that can be told apart.
const MAX_CONTROLLERS: usize = 16;

/// Why a device tree cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TreeError {
    /// It is no device tree, or damaged.
    Malformed,
    /// More of this than Deed can hold.
    TooMany(&'static str),
    /// A `reg` of this cannot be read, is empty or leaves the address space.
    BadReg(&'static str),
    /// A text property of this is no text.
    BadText(&'static str),
    /// No memory node.
    NoMemory,
    /// The timer node, or the interrupt controller that it names, cannot be understood.
    BadTimer,
}

/// A boot module.
#[derive(Clone, Copy, Debug)]
pub struct Module<'a> {
    /// Name of its node below `/chosen`.
    pub name: &'a [u8],
    /// Its bytes.
    pub region: Region,
    /// What it is.
    pub kind: ModuleKind,
    /// Its `bootargs`.
    pub arguments: Option<&'a str>,
}

/// What a boot module is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ModuleKind {
    /// The host: `multiboot,kernel`.
    Kernel,
    /// The host's initial ramdisk: `multiboot,ramdisk`.
    Ramdisk,
    /// Something that Deed does not know.
    Unknown,
}

/// Memory that must stay as it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reservation {
    /// Its bytes.
    pub region: Region,
    /// The host must not map it: it belongs to firmware or to a device.
    pub no_map: bool,
}

/// The timer node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Timer<'a> {
    /// Its name.
    pub name: &'a [u8],
    /// The interrupt of EL1's physical timer, as the node has it.
    pub physical: &'a [u8],
}

/// What a device tree says, as far as Deed wants to know.
#[derive(Clone, Debug, Default)]
pub struct Facts<'a> {
    /// All RAM.
    pub ram: ArrayVec<Region, MAX_RAM>,
    /// `/memreserve/` and `/reserved-memory`.
    pub reserved: ArrayVec<Reservation, MAX_RESERVED>,
    /// Affinities of the CPUs, in the order of their nodes.
    pub cpus: ArrayVec<u64, MAX_CPUS>,
    /// Boot modules.
    pub modules: ArrayVec<Module<'a>, MAX_MODULES>,
    /// Deed's own command line.
    pub arguments: &'a str,
    /// Nodes below the root that the host must not see: fw_cfg and SMMUs, which let it write any memory.
    pub dropped: ArrayVec<&'a [u8], MAX_DROPPED>,
    /// Their registers.
    pub withheld: ArrayVec<Region, MAX_WITHHELD>,
    /// An SMMU is among them, so nodes must not refer to it.
    pub drops_smmu: bool,
    /// The timer.
    pub timer: Timer<'a>,
}

/// What a node below the root is to Deed, by its `compatible`.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Device {
    Timer,
    FwCfg,
    Smmu,
}

const COMPATIBLE: [(&[u8], Device); 6] = [
    (b"arm,armv8-timer", Device::Timer),
    (b"qemu,fw-cfg-mmio", Device::FwCfg),
    (b"arm,smmu-v3", Device::Smmu),
    (b"arm,mmu-500", Device::Smmu),
    (b"arm,smmu-v2", Device::Smmu),
    (b"arm,smmu-v1", Device::Smmu),
];

/// Reads a device tree.
///
/// # Errors
/// See [`TreeError`].
pub fn read(blob: &[u8]) -> Result<Facts<'_>, TreeError> {
    let source = Source::new(blob).ok_or(TreeError::Malformed)?;
    let mut reader = Reader {
        facts: Facts::default(),
        nodes: [Node::default(); LEVELS],
        timer: None,
        controllers: ArrayVec::new(),
    };
    for (start, size) in source.reservations() {
        let region = Region::new(start, size).ok_or(TreeError::BadReg("memreserve"))?;
        push(&mut reader.facts.reserved, Reservation { region, no_map: false }, "reservations")?;
    }
    let mut tokens = source.tokens();
    let mut depth = 0usize;
    loop {
        match tokens.next().ok_or(TreeError::Malformed)? {
            Token::Begin(name) => {
                if let Some(node) = reader.nodes.get_mut(depth) {
                    *node = Node { name, ..Node::default() };
                }
                depth = depth.checked_add(1).ok_or(TreeError::Malformed)?;
            }
            Token::Property { name, value } => {
                let level = depth.checked_sub(1).ok_or(TreeError::Malformed)?;
                if let Some(node) = reader.nodes.get_mut(level) {
                    node.note(source.string(name), value);
                }
            }
            Token::End => {
                depth = depth.checked_sub(1).ok_or(TreeError::Malformed)?;
                reader.finish_node(depth)?;
                if depth == 0 {
                    break;
                }
            }
            Token::Finish => return Err(TreeError::Malformed),
        }
    }
    if tokens.next() != Some(Token::Finish) {
        return Err(TreeError::Malformed);
    }
    reader.finish()
}

/// Levels of nodes that Deed looks at: the root, its children, and theirs.
const LEVELS: usize = 3;

/// A property that Deed knows: its place in [`PROPERTIES`].
#[derive(Clone, Copy)]
enum Property {
    Compatible,
    DeviceType,
    Status,
    Reg,
    AddressCells,
    SizeCells,
    Phandle,
    InterruptParent,
    InterruptCells,
    Interrupts,
    InterruptNames,
    Bootargs,
    NoMap,
}

/// Names of the properties, in the order of [`Property`].
const PROPERTIES: [&[u8]; 13] = [
    b"compatible",
    b"device_type",
    b"status",
    b"reg",
    b"#address-cells",
    b"#size-cells",
    b"phandle",
    b"interrupt-parent",
    b"#interrupt-cells",
    b"interrupts",
    b"interrupt-names",
    b"bootargs",
    b"no-map",
];

/// What is noted of a node: the properties that Deed knows, as they are.
#[derive(Clone, Copy, Default)]
struct Node<'a> {
    name: &'a [u8],
    values: [Option<&'a [u8]>; PROPERTIES.len()],
}

impl<'a> Node<'a> {
    fn note(&mut self, name: &[u8], value: &'a [u8]) {
        let known = PROPERTIES.iter().zip(&mut self.values).find(|(known, _)| **known == name);
        if let Some((_, place)) = known {
            *place = Some(value);
        }
    }

    #[inline(never)]
    fn property(&self, property: Property) -> Option<&'a [u8]> {
        self.values.get(property as usize).copied().flatten()
    }

    /// A property of one cell.
    #[inline(never)]
    fn number(&self, property: Property) -> Option<u32> {
        self.property(property)?.try_into().ok().map(u32::from_be_bytes)
    }

    fn compatible(&self) -> impl Iterator<Item = &'a [u8]> {
        self.property(Property::Compatible).unwrap_or_default().split(|byte| *byte == 0)
    }

    fn is_of_type(&self, device_type: &[u8]) -> bool {
        self.property(Property::DeviceType) == Some(device_type)
    }

    fn is_memory(&self) -> bool {
        self.is_of_type(b"memory\0")
            && matches!(self.property(Property::Status), None | Some(b"okay\0" | b"ok\0"))
    }

    /// Calls `each` for every run of bytes in `reg`, which is made of these [`cells`](Self::cells), mostly the
    /// parent's; a run of size 0 is none.
    fn for_each_region(
        &self,
        cells: Option<(u32, u32)>,
        of: &'static str,
        each: &mut dyn FnMut(Region) -> Result<(), TreeError>,
    ) -> Result<(), TreeError> {
        let bad = TreeError::BadReg(of);
        let (address, size) = cells.ok_or(bad)?;
        let mut rest = self.property(Property::Reg).ok_or(bad)?;
        while !rest.is_empty() {
            let start = take_cells(&mut rest, address).ok_or(bad)?;
            let size = take_cells(&mut rest, size).ok_or(bad)?;
            if size != 0 {
                each(Region::new(start, size).ok_or(bad)?)?;
            }
        }
        Ok(())
    }

    /// Cells of addresses and sizes of the children, where they make numbers of at most 64 bits.
    fn cells(&self) -> Option<(u32, u32)> {
        let (address, size) = super::blob::DEFAULT_CELLS;
        let cells = (
            self.number(Property::AddressCells).unwrap_or(address),
            self.number(Property::SizeCells).unwrap_or(size),
        );
        ((1..=2).contains(&cells.0) && (1..=2).contains(&cells.1)).then_some(cells)
    }
}

struct Reader<'a> {
    facts: Facts<'a>,
    /// The open nodes of the levels that are looked at.
    nodes: [Node<'a>; LEVELS],
    timer: Option<Node<'a>>,
    /// Interrupt controllers: phandle and cells of an interrupt.
    controllers: ArrayVec<(u32, u32), MAX_CONTROLLERS>,
}

impl<'a> Reader<'a> {
    /// Looks at a node of this level when all of it has been read.
    fn finish_node(&mut self, level: usize) -> Result<(), TreeError> {
        let [root, top, child] = self.nodes;
        match (level, top.name) {
            (1, b"chosen") => {
                self.facts.arguments = text(top.property(Property::Bootargs), "chosen")?.unwrap_or("")
            }
            (1, _) => self.finish_device(&root, &top)?,
            (2, b"chosen") => self.finish_module(&top, &child)?,
            (2, b"cpus") if child.is_of_type(b"cpu\0") => self.finish_cpu(&top, &child)?,
            // A node without `reg` asks the kernel to find a place: nothing is reserved yet.
            (2, b"reserved-memory") if child.property(Property::Reg).is_some() => {
                child.for_each_region(top.cells(), "reserved-memory", &mut |region| {
                    let no_map = child.property(Property::NoMap).is_some();
                    let reservation = Reservation { region, no_map };
                    push(&mut self.facts.reserved, reservation, "reservations")
                })?;
            }
            _ => {}
        }
        Ok(())
    }

    fn finish_device(&mut self, root: &Node<'a>, node: &Node<'a>) -> Result<(), TreeError> {
        if node.is_memory() {
            return node.for_each_region(root.cells(), "memory", &mut |region| {
                push(&mut self.facts.ram, region, "runs of RAM")
            });
        }
        let (phandle, cells) = (node.number(Property::Phandle), node.number(Property::InterruptCells));
        if let (Some(phandle), Some(cells)) = (phandle, cells) {
            push(&mut self.controllers, (phandle, cells), "interrupt controllers")?;
        }
        let known = node.compatible().find_map(|name| COMPATIBLE.iter().find(|(known, _)| *known == name));
        match known {
            None => Ok(()),
            Some((_, Device::Timer)) => {
                self.timer = Some(*node);
                Ok(())
            }
            Some((_, device)) => {
                self.facts.drops_smmu |= *device == Device::Smmu;
                push(&mut self.facts.dropped, node.name, "devices to withhold")?;
                node.for_each_region(root.cells(), "device to withhold", &mut |region| {
                    push(&mut self.facts.withheld, region, "ranges to withhold")
                })
            }
        }
    }

    /// The `reg` of a CPU is its affinity, of one cell or two (devicetree bindings, `arm/cpus.yaml`).
    fn finish_cpu(&mut self, cpus: &Node<'a>, node: &Node<'a>) -> Result<(), TreeError> {
        let cells = cpus.number(Property::AddressCells).filter(|cells| (1..=2).contains(cells));
        let affinity =
            cells.zip(node.property(Property::Reg)).and_then(|(cells, mut reg)| take_cells(&mut reg, cells));
        push(&mut self.facts.cpus, affinity.ok_or(TreeError::BadReg("CPU"))?, "CPUs")
    }

    fn finish_module(&mut self, chosen: &Node<'a>, node: &Node<'a>) -> Result<(), TreeError> {
        let is = |what: &[u8]| node.compatible().any(|name| name == what);
        if !is(b"multiboot,module") {
            return Ok(());
        }
        let kind = match (is(b"multiboot,kernel"), is(b"multiboot,ramdisk")) {
            (true, false) => ModuleKind::Kernel,
            (false, true) => ModuleKind::Ramdisk,
            _ => ModuleKind::Unknown,
        };
        let region = module_region(chosen, node)?;
        let arguments = text(node.property(Property::Bootargs), "boot module")?;
        push(&mut self.facts.modules, Module { name: node.name, region, kind, arguments }, "boot modules")
    }

    fn finish(mut self) -> Result<Facts<'a>, TreeError> {
        let timer = self.timer.ok_or(TreeError::BadTimer)?;
        let [root, ..] = &self.nodes;
        let parent =
            timer.number(Property::InterruptParent).or_else(|| root.number(Property::InterruptParent));
        let parent = parent.ok_or(TreeError::BadTimer)?;
        let cells = self.controllers.iter().find(|(phandle, _)| *phandle == parent);
        let (_, cells) = cells.ok_or(TreeError::BadTimer)?;
        let physical = physical_interrupt(&timer, *cells).ok_or(TreeError::BadTimer)?;
        self.facts.timer = Timer { name: timer.name, physical };
        if self.facts.ram.is_empty() { Err(TreeError::NoMemory) } else { Ok(self.facts) }
    }
}

/// The interrupt of EL1's physical timer: the one named "phys", or else the second (Linux
/// `Documentation/devicetree/bindings/timer/arm,arch_timer.yaml`).
fn physical_interrupt<'a>(timer: &Node<'a>, cells: u32) -> Option<&'a [u8]> {
    const PHYSICAL: usize = 1;
    const CELL: usize = 4;
    let size = usize::try_from(cells).ok()?.checked_mul(CELL).filter(|size| *size != 0)?;
    let index = match timer.property(Property::InterruptNames) {
        Some(names) => names.split(|byte| *byte == 0).position(|name| name == b"phys")?,
        None => PHYSICAL,
    };
    timer.property(Property::Interrupts)?.chunks_exact(size).nth(index)
}

/// Where a boot module lies. QEMU's guest-loader writes two 64-bit values, whatever the cells of `/chosen`.
fn module_region(chosen: &Node<'_>, node: &Node<'_>) -> Result<Region, TreeError> {
    const OF: &str = "boot module";
    let bad = TreeError::BadReg(OF);
    let is_two_numbers = node.property(Property::Reg).is_some_and(|reg| reg.len() == 16);
    let mut region = None;
    let cells = if is_two_numbers { Some((2, 2)) } else { chosen.cells() };
    node.for_each_region(cells, OF, &mut |found| {
        region = Some(found);
        Ok(())
    })?;
    region.ok_or(bad)
}

/// Takes a number of one or two cells from the front of a value.
#[inline(never)]
fn take_cells(value: &mut &[u8], cells: u32) -> Option<u64> {
    let mut number = 0;
    for _ in 0..cells {
        let (cell, rest) = value.split_first_chunk()?;
        *value = rest;
        number = number << 32 | u64::from(u32::from_be_bytes(*cell));
    }
    Some(number)
}

fn text<'a>(value: Option<&'a [u8]>, of: &'static str) -> Result<Option<&'a str>, TreeError> {
    let Some(value) = value else { return Ok(None) };
    let bad = TreeError::BadText(of);
    let (end, text) = value.split_last().ok_or(bad)?;
    let text = core::str::from_utf8(text).map_err(|_| bad)?;
    if *end == 0 && !text.contains('\0') { Ok(Some(text)) } else { Err(bad) }
}

fn push<T, const N: usize>(list: &mut ArrayVec<T, N>, item: T, of: &'static str) -> Result<(), TreeError> {
    list.try_push(item).map_err(|_| TreeError::TooMany(of))
}

#[cfg(test)]
mod tests {
    use super::super::sample::{Builder, PHYSICAL_TIMER, Sample};
    use super::*;

    #[test]
    fn the_facts_of_a_machine_are_read() {
        let sample =
            Sample { smmu: true, reserved: vec![((0x5000_0000, 0x1000), true)], ..Sample::default() };
        let blob = sample.blob();
        let facts = read(&blob).unwrap();
        assert_eq!(facts.ram[..], [Region::new(0x4000_0000, 0x4000_0000).unwrap()]);
        assert_eq!(facts.dropped[..], [&b"fw-cfg@9020000"[..], b"smmuv3@9050000"]);
        assert_eq!(facts.timer, Timer { name: b"timer", physical: &PHYSICAL_TIMER });
        assert_eq!(facts.reserved.len(), 1);
        assert!(facts.reserved[0].no_map && facts.drops_smmu);
        let kinds: Vec<_> = facts.modules.iter().map(|module| module.kind).collect();
        assert_eq!(kinds, [ModuleKind::Ramdisk, ModuleKind::Kernel]);
        assert_eq!(facts.arguments, "deed.nonce=00c0ffee");
    }

    #[test]
    fn cpus_are_read_with_one_cell_or_two() {
        for cpus in [vec![], vec![0, 1, 0x100], vec![0x8_0000_0003, 1]] {
            let blob = Sample { cpus: cpus.clone(), ..Sample::default() }.blob();
            assert_eq!(read(&blob).unwrap().cpus[..], cpus);
        }
    }

    #[test]
    fn a_cpu_whose_affinity_cannot_be_read_is_refused() {
        for (cells, reg) in
            [(&[0u32][..], &[0u32, 0][..]), (&[3], &[0, 0, 0]), (&[2], &[1]), (&[1], &[]), (&[], &[1])]
        {
            let mut b = Builder::default();
            b.begin("").begin("cpus").cells("#size-cells", &[0]);
            if !cells.is_empty() {
                b.cells("#address-cells", cells);
            }
            b.begin("cpu@0").text("device_type", "cpu").cells("reg", reg).end().end().end();
            assert_eq!(read(&b.finish(0)).unwrap_err(), TreeError::BadReg("CPU"), "{cells:?} {reg:?}");
        }
    }

    #[test]
    fn memory_with_one_cell_is_read_as_its_parent_says() {
        let mut b = Builder::default();
        b.begin("").cells("#address-cells", &[1]).cells("#size-cells", &[1]).cells("interrupt-parent", &[1]);
        b.begin("memory@40000000")
            .text("device_type", "memory")
            .cells("reg", &[0x4000_0000, 0x1000_0000, 0x6000_0000, 0x1000])
            .end();
        b.begin("intc").cells("phandle", &[1]).cells("#interrupt-cells", &[3]).end();
        b.begin("timer")
            .text("compatible", "arm,armv8-timer")
            .cells("interrupts", &[1, 13, 4, 1, 14, 4])
            .end();
        b.end();
        let blob = b.finish(0);
        let runs =
            [Region::new(0x4000_0000, 0x1000_0000).unwrap(), Region::new(0x6000_0000, 0x1000).unwrap()];
        assert_eq!(read(&blob).unwrap().ram[..], runs);
    }

    #[test]
    fn a_timer_without_the_physical_interrupt_is_refused() {
        let names = |names| Sample { timer_names: Some(names), ..Sample::default() }.blob();
        assert_eq!(read(&names("virt\0hyp")).unwrap_err(), TreeError::BadTimer);
        assert_eq!(read(&names("a\0b\0c\0d\0phys")).unwrap_err(), TreeError::BadTimer);
        assert!(read(&names("virt\0phys")).is_ok());
    }

    #[test]
    fn more_than_deed_can_hold_is_refused_by_name() {
        let ram = (0..MAX_RAM as u64 + 1).map(|n| (n << 32, 0x1000)).collect();
        assert_eq!(
            read(&Sample { ram, ..Sample::default() }.blob()).unwrap_err(),
            TreeError::TooMany("runs of RAM")
        );
        let reservations = vec![(0x1000, 0x1000); MAX_RESERVED + 1];
        let blob = Sample { reservations, ..Sample::default() }.blob();
        assert_eq!(read(&blob).unwrap_err(), TreeError::TooMany("reservations"));
        let cpus = (0..=MAX_CPUS as u64).collect();
        let blob = Sample { cpus, ..Sample::default() }.blob();
        assert_eq!(read(&blob).unwrap_err(), TreeError::TooMany("CPUs"));
        let modules = vec![("multiboot,kernel", (0x1000, 0x1000), None); MAX_MODULES + 1];
        let blob = Sample { modules, ..Sample::default() }.blob();
        assert_eq!(read(&blob).unwrap_err(), TreeError::TooMany("boot modules"));
    }

    #[test]
    fn a_module_of_no_size_or_beyond_the_address_space_is_refused() {
        for at in [(0x4200_0000, 0), (1 << 48, 0x1000), (u64::MAX, 1)] {
            let modules = vec![("multiboot,kernel", at, None)];
            let blob = Sample { modules, ..Sample::default() }.blob();
            assert_eq!(read(&blob).unwrap_err(), TreeError::BadReg("boot module"));
        }
    }

    #[test]
    fn a_tree_without_memory_or_of_no_tree_at_all_is_refused() {
        assert_eq!(
            read(&Sample { ram: vec![], ..Sample::default() }.blob()).unwrap_err(),
            TreeError::NoMemory
        );
        assert_eq!(read(&[]).unwrap_err(), TreeError::Malformed);
        assert_eq!(read(&[0; 64]).unwrap_err(), TreeError::Malformed);
    }

    #[test]
    fn memory_that_is_disabled_is_none() {
        let mut b = Builder::default();
        b.begin("").cells("#address-cells", &[1]).cells("#size-cells", &[1]).cells("interrupt-parent", &[1]);
        for (status, start) in [("disabled", 0x1000_0000), ("okay", 0x4000_0000)] {
            b.begin("memory").text("device_type", "memory").text("status", status);
            b.cells("reg", &[start, 0x1000_0000]).end();
        }
        b.begin("intc").cells("phandle", &[1]).cells("#interrupt-cells", &[3]).end();
        b.begin("timer")
            .text("compatible", "arm,armv8-timer")
            .cells("interrupts", &[1, 13, 4, 1, 14, 4])
            .end();
        b.end();
        let blob = b.finish(0);
        assert_eq!(read(&blob).unwrap().ram[..], [Region::new(0x4000_0000, 0x1000_0000).unwrap()]);
    }

    #[test]
    fn a_tree_that_is_read_is_one_to_another_parser_too() {
        let samples = [
            Sample::default(),
            Sample { smmu: true, total: 0, ..Sample::default() },
            Sample { reserved: vec![((0x5000_0000, 0x1000), true)], ..Sample::default() },
        ];
        for sample in samples {
            let blob = sample.blob();
            let facts = read(&blob).unwrap();
            let other = dtoolkit::fdt::Fdt::new(&blob).unwrap();
            let memory = other.find_node("/memory@40000000").unwrap().reg().unwrap().unwrap();
            let memory: Vec<_> =
                memory.map(|reg| (reg.address::<u64>().unwrap(), reg.size::<u64>().unwrap())).collect();
            assert_eq!(facts.ram.iter().map(|ram| (ram.start(), ram.size())).collect::<Vec<_>>(), memory);
            assert_eq!(Some(facts.arguments), other.chosen().unwrap().bootargs().unwrap());
        }
    }
}
