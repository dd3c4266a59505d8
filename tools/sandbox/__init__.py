"""Where model-written code runs: calls, and sessions that keep their state.

For everybody:
sandbox         the seam: code in, output and how it ended out; once, or again and again in a session
select          picks a tier and proves it with an attack on it, or refuses
room            how many sessions fit in the open files that the host allows

The client's side, of all tiers:
jobs            a job is one call or session; what starts jobs, and the limits of waiting
calls           one call over a job's descriptors
job_session     a session over a job's descriptors
streams         output and answers that are never trusted
figures         which of the figures that came out are figures

The `ns` tier: a private world for each job, forked from a warm interpreter
ns              the tier
fork_server     starts and speaks to the server
zygote          the server: gives each job a world, one of which is always ready, and watches it
template        the warm interpreter: one small spawn and one fork for each world
networks        empty network namespaces, used again and again
world, root     a job's namespaces, and the read-only root that all share
batch           prepared system calls, made in one go
init            process 1 of a job: the smallest program there is
watch           what processes take, from /proc

The other tiers:
landlock        Landlock and seccomp around a plain process of an ordinary user
unsafe          nothing around it; only by explicit choice
keepers, keeper what starts them cold, and the process that ends all that a job leaves
scratch         a job's own folder: is it too full, and away with it
docker          a container for each job
docker_job      what carries a job's descriptors into it, and relay, its end inside

The code's side, of all tiers:
payload         the process that runs a job's code
cell            runs one piece of code the way a notebook does
session_cells   a Python session
shell           a bash session
seccomp         the denied system calls
linux           calls that Python lacks

What runs beside the code (zygote, keeper, relay and what they import) imports the standard library only.
"""
