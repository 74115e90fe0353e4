"""The ground floor: noise, image trees, progress, results and the report. Imports none of the other packages."""
